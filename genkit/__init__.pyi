from .backbones import MLP, DiT, UNet
from .core import (
    Backbone,
    Batch,
    Codec,
    Data,
    Denoiser,
    Frames,
    Generator,
    Guidance,
    Image,
    Label,
    Loss,
    Objective,
    Parametrization,
    Phase,
    Prediction,
    ProbabilityPath,
    Spec,
    Text,
    Tokens,
    Vector,
)
from .data import DATA, DataSource, InMemory
from .diffusion.guidance import classifier_free
from .diffusion.paths import PATHS, VE, VP, Cosine, Linear
from .diffusion.samplers import SAMPLERS, bind, uniform
from .envs.recording import DemoSettings, record_demonstrations
from .integrations.export import ExportSettings, export
from .objectives import DDPM, EDM, GAN, VAE, VQ, AnchoredFlow, Autoencoder, Classifier, Flow, Regression
from .training.latent_cache import EncodeSettings, encode
from .training.reflow import ReflowSettings, reflow
from .training.run import Run, load, sample
from .training.samples import Samples
from .training.sampling import Sampling
from .training.settings import TrainSettings
from .training.train import train

__version__: str
__all__ = [
    "DATA",
    "DDPM",
    "EDM",
    "GAN",
    "MLP",
    "PATHS",
    "SAMPLERS",
    "VAE",
    "VE",
    "VP",
    "VQ",
    "AnchoredFlow",
    "Autoencoder",
    "Backbone",
    "Batch",
    "Classifier",
    "Codec",
    "Cosine",
    "Data",
    "DataSource",
    "DemoSettings",
    "Denoiser",
    "DiT",
    "EncodeSettings",
    "ExportSettings",
    "Flow",
    "Frames",
    "Generator",
    "Guidance",
    "Image",
    "InMemory",
    "Label",
    "Linear",
    "Loss",
    "Objective",
    "Parametrization",
    "Phase",
    "Prediction",
    "ProbabilityPath",
    "ReflowSettings",
    "Regression",
    "Run",
    "Samples",
    "Sampling",
    "Spec",
    "Text",
    "Tokens",
    "TrainSettings",
    "UNet",
    "Vector",
    "bind",
    "classifier_free",
    "encode",
    "export",
    "load",
    "record_demonstrations",
    "reflow",
    "sample",
    "train",
    "uniform",
]  # fmt: skip
