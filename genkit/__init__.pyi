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
from .evaluation.cards import Card
from .evaluation.differences import RunDifferences, diff_runs
from .evaluation.evaluations import EvaluationSettings, evaluate
from .evaluation.likelihoods import LikelihoodResult, LikelihoodSettings, likelihood
from .evaluation.listing import list_runs
from .evaluation.publishing import PushSettings, pull, push
from .evaluation.report.page import write_report
from .evaluation.run_records import RunRecord
from .evaluation.sweeps import SweepResult, SweepSettings, sweep
from .integrations.export import ExportSettings, export
from .integrations.importing import ImportSettings, import_run
from .objectives import DDPM, EDM, GAN, VAE, VQ, AnchoredFlow, Autoencoder, Classifier, Flow, Regression
from .rl.finetune.loop import FinetunedRun, finetune
from .rl.finetune.settings import FinetuneSettings
from .rl.policies.policy import Policy
from .rl.policies.rollout import Rollouts, RolloutSettings, rollout
from .training.annotations import Annotations, annotate
from .training.distillation import DistillSettings, distill
from .training.dry_run import TrainingEstimate, estimate_training
from .training.latent_cache import EncodeSettings, encode
from .training.reflow import ReflowSettings, reflow
from .training.run import Run, load, sample
from .training.samples import Samples
from .training.sampling import Sampling
from .training.settings import TrainSettings
from .training.train import train
from .training.tuning.tune import TunedStudy, TuneSettings, tune

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
    "Annotations",
    "Autoencoder",
    "Backbone",
    "Batch",
    "Card",
    "Classifier",
    "Codec",
    "Cosine",
    "Data",
    "DataSource",
    "DemoSettings",
    "Denoiser",
    "DiT",
    "DistillSettings",
    "EncodeSettings",
    "EvaluationSettings",
    "ExportSettings",
    "FinetuneSettings",
    "FinetunedRun",
    "Flow",
    "Frames",
    "Generator",
    "Guidance",
    "Image",
    "ImportSettings",
    "InMemory",
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
    "PushSettings",
    "ReflowSettings",
    "Regression",
    "RolloutSettings",
    "Rollouts",
    "Run",
    "RunDifferences",
    "RunRecord",
    "Samples",
    "Sampling",
    "Spec",
    "SweepResult",
    "SweepSettings",
    "Text",
    "Tokens",
    "TrainSettings",
    "TrainingEstimate",
    "TuneSettings",
    "TunedStudy",
    "UNet",
    "Vector",
    "annotate",
    "bind",
    "classifier_free",
    "diff_runs",
    "distill",
    "encode",
    "estimate_training",
    "evaluate",
    "export",
    "finetune",
    "import_run",
    "likelihood",
    "list_runs",
    "load",
    "pull",
    "push",
    "record_demonstrations",
    "reflow",
    "rollout",
    "sample",
    "sweep",
    "train",
    "tune",
    "uniform",
    "write_report",
]  # fmt: skip
