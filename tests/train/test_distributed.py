"""Several processes, or a batch in parts: the numbers of one process that sees the whole batch at once."""

import json
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from blip2 import checkpoint, train
from blip2.errors import RecipeError
from blip2.train.group import Group, check_alike, parts_of
from blip2.train.launch import launch
from blip2.train.losses import contrast_sum
from blip2.train.optim import sum_gradients, trained_parameters
from blip2.train.stage1 import own_logits
from tests.train.processes import gradients, in_processes

UNEVEN = {"optim.batch_size": 7}
FIFTY = {"optim.steps": 50, "optim.clip": 1.0, "checkpoint_every": 50, "evaluate_every": 25}


@pytest.fixture
def both(write_recipe, matching_model, opt_model):
    """A recipe for each stage."""
    return write_recipe(1, matching_model), write_recipe(2, opt_model)


def assert_same(found, wanted):
    for name, value in wanted[0].items():
        assert found[0][name] == pytest.approx(value, rel=1e-6, abs=1e-6), name  # of float32
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        if name.endswith("key.bias"):  # moves no attention: its gradient is rounding
            continue
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def cases_of(both, *overrides):
    return [{"path": str(path)} | changes for path in both for changes in overrides]


def check_processes(number, both, tmp_path, cases, training=None):
    in_processes(number, tmp_path / "found.pt", json.dumps(cases), json.dumps(training))
    for case, found in zip(cases, torch.load(tmp_path / "found.pt"), strict=True):
        path, *_ = (path for path in both if str(path) == case["path"])
        changes = {name: value for name, value in case.items() if name not in ("path", "optim.accumulate")}
        assert_same(found, gradients(path, changes))


def test_two_processes_compute_and_learn_what_one_does(both, tmp_path):
    """Of both stages, dropout included: rows that divide evenly or not, in parts, and the authors' half gradient.

    And fifty steps, with evaluations.
    """
    cases = cases_of(both, {}, UNEVEN | {"optim.accumulate": 2})
    training = {"path": str(both[0])} | FIFTY | UNEVEN
    shared = training | {"out": "shared", "optim.accumulate": 2}
    check_processes(2, both, tmp_path, [*cases, {"path": str(both[0]), "optim.itc": "lavis"}], shared)
    assert_same_training(tmp_path / "shared", train.run(both[0], overrides=FIFTY | UNEVEN))


@pytest.mark.slow
def test_four_processes_compute_the_gradients_of_one(both, any_model, write_recipe, tmp_path):
    both = both[0], write_recipe(2, any_model)
    check_processes(4, both, tmp_path, cases_of(both, {}, UNEVEN, UNEVEN | {"optim.accumulate": 2}))


@pytest.mark.parametrize("stage", [1, 2])
def test_parts_in_bf16(both, stage):
    """Nearly those of the whole: what autocast keeps of the first look, without a gradient, the second does not use."""
    half = partial(torch.autocast, "cpu", torch.bfloat16)
    path = both[stage - 1]
    (losses, found), (wanted_losses, wanted) = (
        gradients(path, {"optim.accumulate": number}, autocast=half) for number in (2, 1)
    )
    assert losses == pytest.approx(wanted_losses, rel=1e-2)
    for name in ("qformer.query_tokens", "qformer.layers.0.cross_attention.value.weight", "vision.post_norm.weight"):
        assert (found[name] - wanted[name]).norm() < 0.1 * wanted[name].norm(), name


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("accumulate", [2, 3, 7])
def test_parts_give_the_gradients_of_the_whole(both, stage, accumulate):
    path = both[stage - 1]
    assert_same(gradients(path, UNEVEN | {"optim.accumulate": accumulate}), gradients(path, UNEVEN))


def test_only_what_learns_travels(matching_model):
    model = checkpoint.load(matching_model)
    model.freeze_pretrained()
    parameters = trained_parameters(model)
    sizes = []

    class Two(Group):
        def sum(self, tensor):
            sizes.append(tensor.numel())
            return tensor.mul_(2)

    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    told = torch.tensor([1.0, 2.0])
    sum_gradients(Two(0, 2), parameters, told)
    assert sizes == [sum(parameter.numel() for parameter in parameters.values()) + 2]
    assert told.tolist() == [2, 4] and all((parameter.grad == 2).all() for parameter in parameters.values())


def log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kinds = ("itc", "itm", "lm", "evaluation")
    return {
        (line["step"], kind): line[kind]
        for line in lines
        for kind in kinds
        if kind in line
    }


def assert_same_training(found, wanted):
    """Losses, evaluations and weights, but for what moves no attention, whose gradient is rounding.

    In fifty steps AdamW enlarges the rounding of small gradients: weights differ by 1e-7 on a processor with AVX-512,
    by 6e-5 on one with AVX2.
    """
    assert log(found).keys() == log(wanted).keys()
    for key, value in log(wanted).items():
        assert log(found)[key] == pytest.approx(value, rel=5e-5, abs=2e-5), key
    weights = checkpoint.load(found).state_dict()
    for name, value in checkpoint.load(wanted).state_dict().items():
        if not name.endswith("key.bias"):
            torch.testing.assert_close(weights[name], value, rtol=0, atol=2e-4, msg=name)


def settings(changes):
    return [f"--set={name}={value}" for name, value in changes.items()]


def check_training(path, devices, capfd, **changes):
    alone = train.run(path, overrides=FIFTY | UNEVEN | {"out": "alone"})
    code = launch(["train", str(path), *settings(FIFTY | UNEVEN | changes | {"out": "shared"})], devices)
    told = capfd.readouterr()
    assert code == 0, told.err
    assert told.out == f"{alone.with_name('shared')}\n"
    assert told.err.count("train 50/50") == 1 and "cut_texts" not in told.err
    assert_same_training(alone.with_name("shared"), alone)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("devices", [2, 4])
def test_processes_learn_what_one_learns(both, capfd, stage, devices):
    check_training(both[stage - 1], devices, capfd)


def test_the_launcher_has_the_exit_code_of_its_processes(capfd):
    assert launch(["--version"], 2) == 0
    told = capfd.readouterr()
    assert told.out.count("blip2") == 2
    assert launch(["nonsense"], 2) == 2


# ---- the authors' half gradient -----------------------------------------------------------------------


def toy():
    """Eight pairs in four processes, and what the images' and the texts' vectors are made from."""
    torch.manual_seed(0)
    image_BQD, text_BD = torch.randn(8, 4, 16), torch.randn(8, 16)
    weights = [torch.randn(16, 8).requires_grad_(), torch.randn(16, 8).requires_grad_()]
    temperature = torch.tensor(0.07, requires_grad=True)

    def vectors():
        return torch.cat(
            [F.normalize(image_BQD @ weights[0], dim=-1), F.normalize(text_BD @ weights[1], dim=-1)[:, None]], dim=1
        )

    return vectors, [*weights, temperature]


def toy_gradients(itc, processes=4):
    vectors, parameters = toy()
    vectors_BVE = vectors()
    leaf_BVE = vectors_BVE.detach().requires_grad_()
    for rank in range(processes):
        own = slice(8 * rank // processes, 8 * (rank + 1) // processes)
        logits = own_logits(leaf_BVE, own, parameters[2], itc)
        (contrast_sum(*logits, torch.eye(8).bool()[own], 0.1) / 8).backward()
    vectors_BVE.backward(leaf_BVE.grad)
    return [parameter.grad for parameter in parameters]


def authors_gradients():
    """As `blip2_qformer.py` has it: each process compares its own with what was gathered without a gradient."""
    vectors, parameters = toy()
    everything = vectors().detach()
    for rank in range(4):
        own = slice(2 * rank, 2 * rank + 2)
        mine = vectors()[own]
        labels = torch.arange(8)[own]
        to_text = torch.einsum("bqe,ne->bnq", mine[:, :-1], everything[:, -1]).amax(-1) / parameters[2]
        to_image = torch.einsum("be,nqe->bnq", mine[:, -1], everything[:, :-1]).amax(-1) / parameters[2]
        loss = sum(F.cross_entropy(logits, labels, label_smoothing=0.1) for logits in (to_text, to_image)) / 2
        (loss / 4).backward()  # the mean over the processes
    return [parameter.grad for parameter in parameters]


def test_the_exact_gradient_does_not_depend_on_the_processes():
    for found, wanted in zip(toy_gradients("exact"), toy_gradients("exact", processes=1), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_lavis_has_the_gradient_of_the_authors_code():
    """Half of it, in nearly the same direction, but for the temperature."""
    for found, wanted in zip(toy_gradients("lavis"), authors_gradients(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    whole, half = toy_gradients("exact"), toy_gradients("lavis")
    for exact, lavis in zip(whole[:2], half[:2], strict=True):
        assert 0.4 < lavis.norm() / exact.norm() < 0.6
        assert 0.9 < F.cosine_similarity(lavis.flatten(), exact.flatten(), dim=0) < 0.9999
    torch.testing.assert_close(half[2], whole[2])


# ---- what goes wrong ----------------------------------------------------------------------------------


def test_rows_are_shared_out_evenly():
    for count in range(1, 20):
        for size in range(1, count + 1):
            shares = [Group(rank, size).share(count) for rank in range(size)]
            assert [row for share in shares for row in share] == list(range(count))
            assert {len(share) for share in shares} <= {count // size, -(-count // size)}
            parts = parts_of(shares[-1], 3)
            assert [row for part in parts for row in part] == list(shares[-1]) and all(parts)


@pytest.mark.parametrize("other", [(0, 1, 6.0), (5, 1, 7.0)])
def test_processes_that_do_not_begin_alike_are_told(other):
    class Two(Group):
        def objects(self, own):
            return [own, other]

    with pytest.raises(RecipeError, match=rf"process 1 begins at step {other[0]}, .* the same folders as 'start' and"):
        check_alike(Two(0, 2), 5, {"weight": torch.nn.Parameter(torch.ones(6))})


def test_what_fails_in_one_process_ends_the_others_at_the_same_place():
    class Two(Group):
        others_failed, told = False, None

        def is_any(self, own):
            type(self).told = own
            return own or self.others_failed

    group = Two(0, 2)
    with group.together():
        pass
    assert Two.told is False
    with pytest.raises(MemoryError), group.together():
        raise MemoryError
    assert Two.told is True
    Two.others_failed = True
    with pytest.raises(train.OtherProcessFailed), group.together():
        pass


@pytest.mark.parametrize(
    ("stage", "changes", "problem"),
    [
        (1, {"optim.accumulate": 0}, "optim.accumulate: has to be at least 1, not 0"),
        (1, {"optim.accumulate": 5}, "optim.accumulate: has to be at most optim.batch_size, which is 4; lower it"),
        (1, {"optim.itc": "half"}, "optim.itc: has to be one of 'exact', 'lavis', not 'half'"),
        (2, {"optim.itc": "lavis"}, "optim.itc: belongs to stage 1, but this recipe is for stage 2; remove it"),
    ],
)
def test_values_that_a_recipe_cannot_have(both, stage, changes, problem):
    with pytest.raises(RecipeError, match=re.escape(problem)):
        train.load_recipe(both[stage - 1], changes)
