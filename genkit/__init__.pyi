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
from .diffusion.guidance import classifier_free
from .diffusion.paths import PATHS, VE, VP, Cosine, Linear
from .diffusion.samplers import SAMPLERS, bind, uniform
from .evaluation.cards import Card
from .evaluation.evaluations import EvaluationSettings, evaluate
from .evaluation.likelihoods import LikelihoodResult, LikelihoodSettings, likelihood
from .evaluation.report.page import write_report
from .evaluation.sweeps import SweepResult, SweepSettings, sweep
from .objectives import DDPM, EDM, GAN, VAE, VQ, AnchoredFlow, Autoencoder, Classifier, Flow, Regression
from .rl.finetune.loop import FinetunedRun, finetune
from .rl.finetune.settings import FinetuneSettings
from .rl.policies.policy import Policy
from .rl.policies.rollout import Rollouts, RolloutSettings, rollout
from .training.run import Run, load, sample
from .training.samples import Samples
from .training.sampling import Sampling
from .training.settings import TrainSettings
from .training.train import train

__version__: str
__all__ = [
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
    "Card",
    "Classifier",
    "Codec",
    "Cosine",
    "Data",
    "Denoiser",
    "DiT",
    "EvaluationSettings",
    "FinetuneSettings",
    "FinetunedRun",
    "Flow",
    "Frames",
    "Generator",
    "Guidance",
    "Image",
    "Label",
    "LikelihoodResult",
    "LikelihoodSettings",
    "Linear",
    "Loss",
    "Objective",
    "Parametrization",
    "Phase",
    "Policy",
    "Prediction",
    "ProbabilityPath",
    "Regression",
    "RolloutSettings",
    "Rollouts",
    "Run",
    "Samples",
    "Sampling",
    "Spec",
    "SweepResult",
    "SweepSettings",
    "Text",
    "Tokens",
    "TrainSettings",
    "UNet",
    "Vector",
    "bind",
    "classifier_free",
    "evaluate",
    "finetune",
    "likelihood",
    "load",
    "rollout",
    "sample",
    "sweep",
    "train",
    "uniform",
    "write_report",
]  # fmt: skip
