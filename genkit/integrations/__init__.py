"""Foreign formats: ``FORMATS`` maps the names of ``genkit export --to`` to export formats.

``diffusers_weights`` serves ``--init diffusers:DIR`` and ``diffusers_stage`` serves ``--codec diffusers:DIR``.
"""

from __future__ import annotations

from genkit.integrations.diffusers_export import ToDiffusers
from genkit.integrations.export import ExportFormat, StandaloneRun
from genkit.integrations.lora_files import ToLoRA
from genkit.integrations.policy_export import ToONNX, ToTorchExport, ToTorchScript

__all__ = ["FORMATS", "ExportFormat"]

FORMATS: dict[str, type[ExportFormat]] = {
    "diffusers": ToDiffusers,
    "run": StandaloneRun,
    "lora": ToLoRA,
    "torchscript": ToTorchScript,
    "torch.export": ToTorchExport,
    "onnx": ToONNX,
}
