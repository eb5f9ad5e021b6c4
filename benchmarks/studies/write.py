"""Write all pages of the studies, docs/studies/, from the records.

python benchmarks/studies/write.py
"""

import page_index
import page_speclora

LEFT = [
    "SpecLoRA on CoLA with seeds 3 and 4; on RTE; the sweeps of k and of r; on ARC-Easy and OpenBookQA with SmolLM2",
    "FisherLoRA on ARC-Easy and OpenBookQA: uniform, reduced, opposite and shuffled ranks, AdaLoRA, EVA",
    "Spectral Surgery: policies beside 20 random controls, calibration sizes, modules, energies",
    "compression: retrained and cut adapters of rank 64 with certificates; which number of an audit foretells the loss",
    "ranks: the sweep on a shifted set, layers alone, `select_ranks` against its controls, pilots",
]

if __name__ == "__main__":
    page_index.build(page_speclora.build(), LEFT)
