"""Codebooks: nearest entries, running means, restarts, ranks."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from genkit.backbones import MLP
from genkit.core import Draw, Spec
from genkit.objectives import VQ
from genkit.objectives.autoencoders.vq import Codebook, perplexity, straight_through
from tests.support.exact_latent import F64
from tests.support.objectives import batch_of


def test_the_gradient_goes_straight_through():
    z, code = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3)
    out = straight_through(z, code)
    assert torch.allclose(out, code)
    way = torch.randn(6, 3)
    assert torch.equal(torch.autograd.grad((out * way).sum(), z)[0], way)


def test_the_encoder_learns_from_the_decoder_at_the_code():
    """d loss / d z is that of the reconstruction at the code, and the pull to the code: by finite differences of the
    decoder at the code, where the true derivative by z is 0."""
    objective = VQ(latent=(3,), codebook_size=8, commitment_weight=0.7)
    torch.manual_seed(1)
    nets = {k: v.double() for k, v in objective.networks(MLP(width=16), Spec((4,))).items()}
    nets["codebook"].codes.normal_()
    x, z = torch.randn(5, 4, dtype=F64), torch.randn(5, 3, dtype=F64, requires_grad=True)
    loss = objective.loss("vq", {**nets, "encoder": lambda x, cond: z}, batch_of(x)).per_sample
    got = torch.autograd.grad(loss.sum(), z)[0]
    code = nets["codebook"](z.detach()).vectors.requires_grad_()
    through = torch.autograd.grad((nets["decoder"](code) - x).square().mean(1).sum(), code)[0]
    pull = 0.7 * 2 * (z - code).detach() / 3
    assert torch.allclose(got, through + pull)


def test_codes_are_the_nearest():
    book = Codebook(20, 3)
    z = torch.randn(7, 3, 4, 5)
    quantized = book(z)
    away = (z.movedim(1, -1)[..., None, :] - book.codes).square().sum(-1)
    assert torch.equal(quantized.indices, away.argmin(-1))
    assert torch.equal(quantized.vectors, book.codes[quantized.indices].movedim(-1, 1))


def test_the_codebook_follows_running_means():
    """van den Oord et al. 2017, eq. 6-8, written out; and micro-batches make no difference."""
    torch.manual_seed(0)
    books = [Codebook(6, 2) for _ in range(2)]
    start = torch.randn(6, 2)
    for book in books:
        book.codes.copy_(start)
        book.counts.fill_(1.0)
        book.sums.copy_(start)
    count, total, codes = torch.ones(6), start.clone(), start.clone()
    for step in range(5):
        z, priority = torch.randn(40, 2), 1 - Draw((step,), 0, 40).uniform()
        entry = books[0](z).indices
        books[0].record(z, entry, priority)
        for a, b in ((0, 13), (13, 14), (14, 40)):
            books[1].record(z[a:b], entry[a:b], priority[a:b])
        for book in books:
            book.update(0.9, 0.0)
        hot = nn.functional.one_hot(entry, 6).float()
        count, total = 0.9 * count + 0.1 * hot.sum(0), 0.9 * total + 0.1 * hot.T @ z
        codes = total / count[:, None]
        assert torch.allclose(books[0].codes, codes, atol=1e-5)
        assert torch.allclose(books[1].codes, codes, atol=1e-5)


def test_dead_entries_restart_and_find_all_clusters():
    """Sixteen clusters, all entries far from them at the start: without restarts one entry takes everything."""
    centres = torch.cartesian_prod(*2 * [torch.tensor([-3.0, -1.0, 1.0, 3.0])])
    used = {}
    for threshold in (0.0, 0.05):
        book = Codebook(16, 2)
        torch.manual_seed(0)
        book.codes.copy_(torch.tensor([30.0, 30.0]) + torch.randn(16, 2))
        for step in range(200):
            z = centres[torch.randint(16, (128,))] + 0.1 * torch.randn(128, 2)
            quantized = book(z)
            book.record(z, quantized.indices, 1 - Draw((step,), 0, 128).uniform())
            book.update(0.9, threshold)
        used[threshold] = float(perplexity(book(centres).indices.bincount(minlength=16).float()))
    assert used[0.0] < 3
    assert used[0.05] > 11
    assert float(torch.cdist(centres, book.codes).min(1).values.median()) < 0.1


def test_what_is_not_finite_does_not_enter_the_codebook():
    book = Codebook(4, 2)
    z, priority = torch.randn(10, 2), torch.full((10,), 0.5)
    z[3], priority[3] = math.nan, 1.0
    book.codes[1:] = 100.0  # dead, so that the vectors of highest priority stand in
    book.record(z, torch.zeros(10, dtype=torch.long), priority)
    book.update(0.5, 0.1)
    assert float(book.sums[0].sum() / book.counts[0]) == pytest.approx(float(z.nansum() / 9), rel=1e-5)
    assert all(bool((z == code).all(1).any()) for code in book.codes[1:])


def test_perplexity():
    assert float(perplexity(torch.tensor([5.0, 5, 5, 5]))) == pytest.approx(4)
    assert float(perplexity(torch.tensor([7.0, 0, 0]))) == pytest.approx(1)
    assert VQ().warning({"step": 600, "vq/perplexity": 1.2}) is not None
    assert VQ().warning({"step": 600, "vq/perplexity": 40.0}) is None


def test_evaluation_leaves_the_codebook_alone():
    objective = VQ(latent=(2,), codebook_size=4)
    nets = objective.networks(MLP(width=8), Spec((2,)))
    for training in (False, True):
        nets["codebook"].train(training)
        objective.loss("vq", nets, batch_of(torch.randn(30, 2)))
        assert (float(nets["codebook"].new_counts.sum()) == 30) == training


def rank(number, where, answers):
    """Half of the rows of three steps, on one of two ranks."""
    dist.init_process_group("gloo", init_method=f"file://{where}", rank=number, world_size=2)
    answers[number] = three_steps(slice(40 * number, 40 * number + 40))
    dist.destroy_process_group()


def three_steps(rows):
    torch.manual_seed(3)
    book = Codebook(32, 2)
    for step in range(3):
        z, priority = torch.randn(80, 2), 1 - Draw((step,), 0, 80).uniform()
        book.record(z[rows], book(z[rows]).indices, priority[rows])
        book.update(0.9, 0.2)
    return book.codes


def test_two_ranks_have_the_codebook_of_one(tmp_path):
    with mp.Manager() as manager:
        answers = manager.dict()
        mp.start_processes(rank, (str(tmp_path / "store"), answers), nprocs=2, start_method="fork")
        one, two = answers[0], answers[1]
    assert torch.equal(one, two)
    assert torch.allclose(one, three_steps(slice(0, 80)), atol=1e-6)
