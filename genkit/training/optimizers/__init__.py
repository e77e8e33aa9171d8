"""Optimizers: families that make the optimizer of a phase, by name (``--optimizer``)."""

from genkit.training.optimizers.bitsandbytes import AdamW8bit
from genkit.training.optimizers.family import OptimizerFamily, PhaseRates
from genkit.training.optimizers.muon import MuonFamily
from genkit.training.optimizers.pytorch_optimizer import (
    LAMB,
    LARS,
    SOAP,
    AdaBelief,
    Lion,
    Prodigy,
    ScheduleFree,
    Shampoo,
)
from genkit.training.optimizers.sharpness import SAMFamily
from genkit.training.optimizers.torch_optimizers import SGD, Adafactor, Adam, AdamW, NAdam, RAdam

OPTIMIZERS: dict[str, type[OptimizerFamily]] = {
    "adamw": AdamW,
    "adam": Adam,
    "sgd": SGD,
    "radam": RAdam,
    "nadam": NAdam,
    "adafactor": Adafactor,
    "muon": MuonFamily,
    "sam": SAMFamily,
    "lars": LARS,
    "lamb": LAMB,
    "adabelief": AdaBelief,
    "shampoo": Shampoo,
    "soap": SOAP,
    "lion": Lion,
    "prodigy": Prodigy,
    "schedule-free": ScheduleFree,
    "adamw-8bit": AdamW8bit,
}

__all__ = ["OPTIMIZERS", "OptimizerFamily", "PhaseRates"]
