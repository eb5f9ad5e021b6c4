"""Write all pages of the studies, docs/studies/, from the records.

python benchmarks/studies/write.py
"""

import page_compression
import page_fisherlora
import page_index
import page_ranks
import page_speclora
import page_surgery

LEFT = [
    "SpecLoRA on CoLA with seeds 3 and 4; on RTE; the sweeps of k and of r; on ARC-Easy and OpenBookQA with SmolLM2",
    "FisherLoRA: uniform ranks at exactly equal parameters, ranks by module, shuffled ranks, AdaLoRA, EVA; fewer data",
    "Spectral Surgery: two more adapters; accuracy, calibration sizes, modules, energies, what `refine` decides",
    "compression: retrained and cut adapters of rank 64 with certificates; which number of an audit foretells the loss",
    "ranks: the sweep on a shifted set, layers alone, `select_ranks` against its controls, pilots",
]

if __name__ == "__main__":
    studies = (page_speclora, page_fisherlora, page_surgery, page_compression, page_ranks)
    page_index.build([claim for study in studies for claim in study.build()], LEFT)
