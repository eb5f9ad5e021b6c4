"""What a user's script looks like to a type checker. Lines marked `# error` name things that do not exist."""

from __future__ import annotations

import lorakit
from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.lens import AuditReport, SpectralCallback, audit

report: AuditReport = audit("adapter/")
print(report.next_steps, lorakit.__version__)
lorakit.lens.compare("a/", "b/")
lorakit.compress.truncate("adapter/", "smaller/", energy=0.9)
lorakit.fisher.probe
lorakit.experiments.rank_sweep
lorakit.cost.accounting
lorakit.surgery.reweight
lorakit.spectral.effective_rank
lorakit.adapters.open_adapter("adapter/")
SpecLoRAConfig(r=16)
FisherLoRAConfig(r=16)
SpectralCallback(every=10)

lorakit.lens.audits  # error
lorakit.lenses  # error
lorakit.spectral.efective_rank  # error
from lorakit.surgery import rewieght  # noqa: E402, F401  # error
