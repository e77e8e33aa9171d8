"""Several feature spaces in one pass, DINOv2 and CLIP with tiny random weights, sFID, CMMD, MIND, named statistics."""

import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import genkit
from genkit import config
from genkit.cli.main import main
from genkit.core import Label, Spec
from genkit.data import InMemory
from genkit.data.codecs import Pixels
from genkit.evaluation import evaluate_all, measurement, metrics
from genkit.evaluation.cards import Card
from genkit.evaluation.evaluator import Evaluator, measure_together
from genkit.evaluation.measurement import Space, measure_spaces
from genkit.evaluation.metrics import CLIP, METRICS, DINOv2, Inception, InceptionSpatial, Moments, TorchFidelity
from genkit.evaluation.metrics.inception import PLACE_CHANNELS, InceptionV3
from genkit.evaluation.metrics.spatial import SpatialExtractor, share_networks
from genkit.evaluation.metrics.vision import RESIZERS, VisionExtractor, cached_or_downloaded
from genkit.evaluation.named_statistics import find_statistics, require_same_features
from genkit.evaluation.sources import DatasetSamples
from tests.evaluation.test_features import images, random_weights  # noqa: F401  # a fixture

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14, "image_size": 28}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Folders of random DINOv2 and CLIP networks of a few thousand parameters."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    top = tmp_path_factory.mktemp("networks")
    transformers.Dinov2Model(transformers.Dinov2Config(**TINY)).save_pretrained(top / "dinov2")
    config = transformers.CLIPVisionConfig(**TINY, intermediate_size=16, projection_dim=8)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(top / "clip")
    return top


def stored(n, seed=0, shift=0):
    x = (images(n, 3, 16, 16, seed).int() + shift).clamp(0, 255).to(torch.uint8)
    spec = Spec((3, 16, 16), {"label": Label(2)})
    data = InMemory(x, {"label": torch.arange(n) % 2}, spec, Pixels())
    return DatasetSamples(data, "images", None, "train")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- one pass
def test_several_spaces_are_measured_in_one_pass_with_the_numbers_of_each_alone(tmp_path, networks, monkeypatch):
    for name, seed in (("a", 0), ("b", 1)):
        np.savez(tmp_path / f"{name}.npz", images(40, 3, 16, 16, seed).permute(0, 2, 3, 1).numpy())
    drawn = []
    rows = DatasetSamples.rows
    monkeypatch.setattr(DatasetSamples, "rows", lambda self, first, last, n: drawn.append(self.name) or rows(self, first, last, n))  # fmt: skip # noqa: E501
    options = {"reference": str(tmp_path / "b.npz"), "batch": 16, "metrics": "fid,kid"}
    further = [f"dinov2={networks / 'dinov2'}", f"clip={networks / 'clip'}"]
    together = evaluate_all(str(tmp_path / "a.npz"), features="raw", further_features=further, **options)
    once = sum("a.npz" in name for name in drawn)
    assert [card.settings["features"]["name"] for card in together] == ["raw", "dinov2", "clip"]
    assert [list(card.metrics) for card in together] == [
        ["fid", "kid"], ["fid", "kid", "precision", "recall", "density", "coverage"], ["cmmd"]
    ]  # fmt: skip
    assert [card.title("fid") for card in together[:2]] == ["fd (raw)", "fd (dinov2)"]
    assert together[2].title("cmmd") == "cmmd"
    drawn.clear()
    alone = genkit.evaluate(str(tmp_path / "a.npz"), features={"name": "dinov2", "weights": str(networks / "dinov2")}, **options)  # fmt: skip # noqa: E501
    assert sum("a.npz" in name for name in drawn) == once, "one pass for three spaces draws as often as for one"
    assert alone.metrics["fid"] == together[1].metrics["fid"]
    with pytest.raises(ValueError, match=r"further_features: given dinov; allowed: .*did you mean dinov2"):
        evaluate_all(str(tmp_path / "a.npz"), features="raw", further_features=["dinov"], **options)
    with pytest.raises(ValueError, match="raw=x: weights: unknown setting"):
        evaluate_all(str(tmp_path / "a.npz"), features="raw", further_features=["raw=x"], **options)
    with pytest.raises(ValueError, match="further_features: raw is measured already"):
        evaluate_all(str(tmp_path / "a.npz"), features="raw", further_features=["raw"], **options)


def test_a_killed_measurement_in_several_spaces_goes_on(tmp_path, networks):
    """What a process that is killed has stored is used by the next one, and gives the same numbers."""
    samples, reference = stored(64), stored(64, 1)
    kinds = [DINOv2(str(networks / "dinov2"), side=28), CLIP(str(networks / "clip"))]
    evaluators = [Evaluator.create(samples, reference, {"kid": METRICS["kid"]}, kind, batch=8) for kind in kinds]
    whole = measure_together(evaluators, samples, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "SAVE_SECONDS", 0.0)

        def stop(task, done, total):
            if done >= 40:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            measure_together(evaluators, samples, 64, stop)
        resumed = []
        again = measure_together(evaluators, samples, 64, lambda task, done, total: resumed.append(done))
    assert resumed[:2] == [0, 8], "the first block of 4 is not measured again"
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a.statistics.features, b.statistics.features)
        assert torch.equal(a.statistics.moments.mean, b.statistics.moments.mean)


# ------------------------------------------------------------------------------------------------- preprocessing
@pytest.mark.parametrize("side", [16, 40])
def test_preprocessing_is_that_of_torch_fidelity(networks, side):
    """DINOv2's own extractor there, with our tiny network in place of the published one."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_dinov2")
    ours = DINOv2(str(networks / "dinov2"), side=224, resize="tensorflow").load("cpu")
    theirs = object.__new__(fidelity.FeatureExtractorDinoV2)
    torch.nn.Module.__init__(theirs)
    theirs.features_list, theirs.feature_extractor_internal_dtype = ["dinov2"], torch.float32
    theirs.model = lambda x: ours.network(pixel_values=x).last_hidden_state[:, 0]
    x = images(3, 3, side, side + 5)
    with torch.no_grad():
        (expected,) = theirs(x)
    torch.testing.assert_close(ours(x).features, expected, rtol=1e-4, atol=1e-4)


def test_resizers_are_those_that_the_papers_name():
    """Pillow's and torch's bicubic filters agree but for rounding; a picture of the right size is left as it is."""
    from torchvision.transforms import functional as TF

    x = (images(2, 3, 20, 30).int() // 2 + 64).to(torch.uint8)  # nothing is clipped
    pillow = torch.stack([TF.pil_to_tensor(TF.resize(TF.to_pil_image(p), [28, 28], TF.InterpolationMode.BICUBIC)) for p in x])  # fmt: skip # noqa: E501
    assert torch.equal(RESIZERS["pillow"](x, 28), pillow.float())
    rounded = RESIZERS["float"](x, 28).clamp(0, 255)
    assert (rounded - pillow).abs().max() <= 1.2
    for resize in RESIZERS.values():
        torch.testing.assert_close(resize(x[..., :20], 20), x[..., :20].float(), rtol=0, atol=1e-3)
    ramp = (10 * torch.arange(4)).to(torch.uint8).expand(1, 3, 4, 4)
    row = torch.tensor([0.0, 5, 10, 15, 20, 25, 30, 30])  # TensorFlow's pixel j is at j / 2, and the edge is repeated
    wide = row.expand(1, 3, 8, 8)
    for given, expected in ((ramp, wide), (ramp.mT, wide.mT)):
        torch.testing.assert_close(RESIZERS["tensorflow"](given, 8), expected, atol=1e-4, rtol=0)


def test_features_of_transformers(networks):
    x = images(5, 1, 20, 20)
    dino, clip = (
        kind(str(networks / name), side=28).load("cpu") for kind, name in ((DINOv2, "dinov2"), (CLIP, "clip"))
    )
    features = clip(x).features
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    assert (dino.dim, clip.dim) == (16, 8)
    torch.testing.assert_close(dino(x).features, dino(x.expand(-1, 3, -1, -1)).features)
    torch.testing.assert_close(dino(x).features[2:3], dino(x[2:3]).features, rtol=1e-4, atol=1e-5)
    pixels = (RESIZERS["float"](x.expand(-1, 3, -1, -1), 28) / 255 - torch.tensor(CLIP.mean).view(3, 1, 1)) / torch.tensor(CLIP.std).view(3, 1, 1)  # fmt: skip # noqa: E501
    with torch.no_grad():
        direct = clip.network(pixel_values=pixels).image_embeds
    torch.testing.assert_close(features, direct / direct.norm(dim=1, keepdim=True), rtol=1e-3, atol=1e-5)
    assert dino.settings["sha256"] != clip.settings["sha256"]


def test_missing_weights_and_networks_are_refused_in_one_line(tmp_path, networks, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"holds no config\.json; needs a folder of transformers"):
        DINOv2(str(tmp_path)).load("cpu")
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match=r"no model\.safetensors, .*transformers\.Dinov2Model\.from_pretrained"):
        DINOv2(str(tmp_path)).load("cpu")
    with pytest.raises(ValueError, match=r"dinov2: .*hf download owner/none .*--features.weights"):
        DINOv2(model="owner/none").load("cpu")
    with pytest.raises(ValueError, match="needs images, uint8"):
        DINOv2(str(networks / "dinov2"), side=28).load("cpu")(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="torch-fidelity: "):
        TorchFidelity(layer="none").load("cpu")


def test_weights_of_another_network_are_refused_not_filled_with_random_numbers(networks):
    for kind, other in ((CLIP, "dinov2"), (DINOv2, "clip")):
        with pytest.raises(ValueError, match=r"is no .* of transformers: it lacks \d+ of the network's tensors"):
            kind(str(networks / other)).load("cpu")
    with pytest.raises(ValueError, match=r"side: given 5, which this network of dinov2 .*--features.side 28"):
        DINOv2(str(networks / "dinov2"), side=5).load("cpu")
    with pytest.raises(ValueError, match="side: given 0; should be greater than or equal to 1"):
        config.from_dict(DINOv2, {"side": 0})


def test_weights_of_16_bits_give_features_of_32(tmp_path, networks):
    transformers = pytest.importorskip("transformers")
    x, whole = images(2, 3, 28, 28), CLIP(str(networks / "clip")).load("cpu")
    network = transformers.CLIPVisionModelWithProjection.from_pretrained(networks / "clip")
    network.half().save_pretrained(tmp_path / "half")
    half = CLIP(str(tmp_path / "half")).load("cpu")
    torch.testing.assert_close(half(x).features, whole(x).features, rtol=0, atol=2e-3)
    assert {p.dtype for p in half.network.parameters()} == {torch.float32}


def test_extractors_of_torch_fidelity_are_used_with_their_default_layer(tmp_path):
    """One that is registered there: grey pictures become RGB, and features are what it returns."""
    fidelity = pytest.importorskip("torch_fidelity")

    class Means(fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **options):
            super().__init__(name, features_list)

        def forward(self, x):
            assert x.dtype == torch.uint8
            return (x.float().mean((2, 3)),)

        @staticmethod
        def get_provided_features_list():
            return ("means",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "means"

    from torch_fidelity import registry

    registry.FEATURE_EXTRACTORS_REGISTRY["means"] = Means
    extract = TorchFidelity(extractor="means").load("cpu")  # type: ignore[arg-type]
    x = images(3, 1)
    assert torch.equal(extract(x).features, x.expand(-1, 3, -1, -1).float().mean((2, 3)))
    assert (extract.dim, extract.settings["layer"]) == (3, "means")
    known = {str(extract.settings)}
    for name in "ab":  # stored statistics of a reference are found by these settings
        (tmp_path / name).write_text(name)
        known.add(str(TorchFidelity("means", weights=str(tmp_path / name)).load("cpu").settings))  # type: ignore[arg-type]
    assert len(known) == 3, "other weights are other features"


# ------------------------------------------------------------------------------------------------- sFID
def test_spatial_features_are_the_first_channels_of_the_first_branch_of_mixed_6():
    class Base:
        """An extractor whose maps are known."""

        def __init__(self):
            self.settings, self.dim = {"name": "inception", "dim": 2048}, 2048
            self.last_input, self.last_places, self.calls = None, None, 0

        def __call__(self, x):
            self.calls, self.last_input, self.last_places = self.calls + 1, x, x.flatten(1).float()

    base = Base()
    spatial = SpatialExtractor(base)  # type: ignore[arg-type]
    x = torch.arange(24.0).view(2, 12)
    assert torch.equal(spatial(x).features, x)
    assert torch.equal(spatial(x).features, x)
    assert base.calls == 1, "the maps of the last samples are used again"
    spatial(x + 1)
    assert base.calls == 2
    assert metrics.metric_title("fid", "inception-spatial") == "sfid"
    share_networks([base, spatial])
    assert spatial.base is base


@pytest.fixture
def published_sizes(tmp_path, random_weights):  # noqa: F811
    """Random weights of the whole Inception-v3, and extractors of pool3 features and of places that use them."""
    file = tmp_path / "inception.safetensors"
    save_file(random_weights, file)
    return Inception(weights=str(file)).load("cpu"), InceptionSpatial(weights=str(file)).load("cpu")


@pytest.mark.slow
def test_spatial_features_of_the_full_network(published_sizes):
    pooled, spatial = published_sizes
    x, network = images(2), pooled.network
    assert isinstance(network, InceptionV3)
    with torch.no_grad():
        h = pooled.resize(x) / pooled.scale - 1
        for layer in network.layers[:13]:
            h = layer(h)
        expected = network.layers[13].branches[0](h)[:, :PLACE_CHANNELS]  # pyright: ignore
    torch.testing.assert_close(spatial(x).features, expected.flatten(1), rtol=1e-4, atol=1e-4)
    assert spatial.dim == spatial(x).features.shape[1] == 2023
    share_networks([pooled, spatial])
    assert spatial.base is pooled


@pytest.mark.slow
def test_further_spaces_cost_little_beside_the_largest_network(published_sizes, capsys):
    """FID, KID, precision and recall, density and coverage, MIND, sFID beside FD-DINOv2: CPU seconds of one process,
    with networks of the published sizes, the least of three turns each."""
    transformers = pytest.importorskip("transformers")
    large = transformers.Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
    network = transformers.Dinov2Model(large)
    dino = VisionExtractor(DINOv2(), network, "random", lambda net, x: net(pixel_values=x).last_hidden_state[:, 0],
                           torch.device("cpu"))  # fmt: skip
    share_networks([*published_sizes, dino])
    samples, seconds = stored(3), {}
    keep = frozenset({"features"})
    for _ in range(3):
        for name, extractors in (("alone", [dino]), ("together", [*published_sizes, dino])):
            begun = time.process_time()
            measure_spaces(samples, [Space(extractor, keep) for extractor in extractors], 3)
            seconds[name] = min(seconds.get(name, 1e9), time.process_time() - begun)
    ratio = seconds["together"] / seconds["alone"]
    with capsys.disabled():
        print(f"CPU seconds of 3 pictures: {seconds}, ratio {ratio:.3f}")
    assert ratio <= 1.3


# ------------------------------------------------------------------------------------------------- CMMD and MIND
def test_cmmd_is_the_published_estimator():
    """Against the formula by hand: kernels of all pairs, each row with itself too, times 1000."""
    x, y = (F.normalize(torch.randn(n, 4, generator=torch.Generator().manual_seed(n)).double()) for n in (30, 20))

    def kernels(a, b):
        return np.exp(-np.square(a[:, None].numpy() - b[None].numpy()).sum(-1) / 200).mean()

    expected = 1000 * (kernels(x, x) + kernels(y, y) - 2 * kernels(x, y))
    assert metrics.cmmd(x, y).value == pytest.approx(expected, rel=1e-9)
    assert metrics.cmmd(x, x).value == pytest.approx(0, abs=1e-9)


def test_mind_is_three_times_the_dimension_times_the_sliced_distance():
    g = torch.Generator().manual_seed(0)
    x, v = torch.randn(60, 5, generator=g).double(), torch.tensor([1.0, 0, 2, 0, 0], dtype=torch.float64)
    assert metrics.mind(x, x[torch.randperm(60)]).value == pytest.approx(0, abs=1e-12)
    # a shift by v: |v|^2 / D in the mean over directions
    shifted = metrics.mind(x, x + v, 40_000)
    assert shifted.value == pytest.approx(3 * 5 * 5 / 5, rel=2e-2)
    # of which a sample's influence is 3 D times the mean of -2 (d.v) (d.x), that is -6 v.x
    assert shifted.high - shifted.low == pytest.approx(2 * 1.96 * 6 * float((x @ v).std()) / 60**0.5, rel=3e-2)
    q = torch.special.ndtri((torch.arange(4000).double() + 0.5) / 4000)[:, None]
    assert metrics.mind(1 + 2 * q, q, 3).value == pytest.approx(3 * 2, rel=1e-3)  # N(1, 2^2) and N(0, 1)
    larger = metrics.mind(x, torch.cat([x, x + v]), 100)
    assert larger == metrics.mind(x, torch.cat([x, x + v]), 100), "the subset of a larger set is the same each time"


@pytest.mark.parametrize(("name", "least"), [("mind", 0.9), ("cmmd", 0.9)])
def test_intervals_hold_the_mean_of_other_draws(name, least):
    """Of 150 intervals at 95 % about that share holds the mean at this n against this reference, and of those at 50 %
    about half."""
    g = torch.Generator().manual_seed(0)
    reference = torch.randn(100, 4, generator=g)
    compute = {"mind": lambda x, level: metrics.mind(x, reference, 20, level=level),
               "cmmd": lambda x, level: metrics.cmmd(F.normalize(x), F.normalize(reference), level)}[name]  # fmt: skip
    draws = [1.3 * torch.randn(100, 4, generator=g) + 0.5 for _ in range(150)]
    for level, low, high in ((0.95, least, 1.0), (0.5, 0.38, 0.66)):
        estimates = [compute(x, level) for x in draws]
        mean = np.mean([e.value for e in estimates])
        assert low <= np.mean([e.low < mean < e.high for e in estimates]) <= high


def test_an_interrupted_download_is_taken_up_again(networks, tmp_path):
    """The hub library returns the folder of a killed download as if it were whole."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    whole, broken = networks / "dinov2", tmp_path / "broken"
    broken.mkdir()
    shutil.copy(whole / "config.json", broken)
    asked = []

    def snapshot_download(model, allow_patterns, local_files_only=False):
        asked.append(local_files_only)
        return str(broken if local_files_only else whole)

    hub = SimpleNamespace(snapshot_download=snapshot_download, errors=huggingface_hub.errors)
    assert cached_or_downloaded(hub, "owner/model", []) == str(whole)
    assert asked == [True, False]
    shutil.copy(whole / "model.safetensors", broken)
    assert cached_or_downloaded(hub, "owner/model", []) == str(broken)
    assert asked == [True, False, True]


# ------------------------------------------------------------------------------------------------- named statistics
def test_statistics_by_name_are_kept_and_refused_in_other_features(tmp_path, capsys):
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", np.random.default_rng(ord(name)).normal(size=(50, 3)).astype(np.float32))
    a, b = (str(tmp_path / f"{name}.npz") for name in "ab")
    stats = ["--features=raw", "--metrics=fid", "--reference", "stats:b"]
    assert main(["eval", a, *stats]) == 2
    assert "given stats:b; stored: none; --save-stats stats:b stores them" in capsys.readouterr().err
    assert main(["eval", b, "--features=raw", "--save-stats", "stats:b"]) == 0
    assert main(["eval", a, *stats, f"--out={tmp_path}/named.json"]) == 0
    assert main(["eval", a, b, "--features=raw", "--metrics=fid", f"--out={tmp_path}/direct.json"]) == 0
    named, direct = (Card.load(tmp_path / f"{name}.json") for name in ("named", "direct"))
    assert named.metrics["fid"].value == pytest.approx(direct.metrics["fid"].value, rel=1e-6)
    file = tmp_path / "cache" / "statistics" / "b.npz"
    assert Moments.load(file).n == 50
    for source, replaced in ((b, False), (a, True)):
        capsys.readouterr()
        assert main(["eval", source, "--features=raw", "--save-stats", "stats:b"]) == 0
        assert ("b.npz: held other statistics, which these replace" in capsys.readouterr().err) is replaced
    with np.load(file) as arrays:
        changed = {**arrays, "features": np.asarray('{"name": "inception", "dim": 3}')}
    np.savez(file, **changed)
    assert main(["eval", a, *stats]) == 2
    assert "has statistics of features with name: inception; these have raw" in capsys.readouterr().err
    assert main(["eval", a, "--reference", "clean-fid:cifar10", "--features=raw"]) == 2
    assert "needs clean-fid:DATASET-SPLIT-SIDE" in capsys.readouterr().err


def test_published_statistics_are_those_of_inception_only(tmp_path, monkeypatch, capsys):
    """Statistics of the same length as other features are refused too, and a download writes nothing into JSON."""
    cleanfid = pytest.importorskip("cleanfid.features")

    def download(name, side, mode, split):
        print("downloading")
        return np.zeros(3), np.eye(3)

    monkeypatch.setattr(cleanfid, "get_reference_statistics", download)
    np.savez(tmp_path / "a.npz", np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32))
    for _ in range(2):  # downloaded, and kept
        argv = ["eval", str(tmp_path / "a.npz"), "--reference=clean-fid:x-train-32", "--features=raw", "--metrics=fid"]
        assert main([*argv, "--json"]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert "has statistics of features with name: inception; these have raw" in said.err
    published = find_statistics("clean-fid:x-train-32", "clean")
    inception = {"name": "inception", "resize": "clean", "precision": "fp32"}
    require_same_features(published, inception)
    with pytest.raises(ValueError, match="features with precision: fp32; these have bf16"):
        require_same_features(published, {**inception, "precision": "bf16"})
    with pytest.raises(ValueError, match="statistics of Inception's features; take --features inception"):
        find_statistics("clean-fid:x-train-32", "pillow")
