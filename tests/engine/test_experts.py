"""Live models that wear experts: which values they have then, that they get their bits back, and what is refused."""

from __future__ import annotations

import gc
import json
import random
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastmerge import experts, ops
from fastmerge.engine import expert_model
from fastmerge.engine.ahead import ahead
from fastmerge.engine.safetensors_header import TensorInfo
from fastmerge.engine.sources import StateDictSource
from fastmerge.errors import ArgumentError, ArgumentTypeError, CheckpointError, FastmergeError
from fastmerge.experts import ExpertSet, ModelExpert
from tests.engine.small_family import Tensors, family, save_family
from tests.numeric import assert_bitwise_equal

NAMES = ("math", "code", "chat")
bf16 = torch.bfloat16


class Tiny(nn.Module):
    """An embedding that the head shares, a matrix, a norm, and a buffer."""

    def __init__(self, dtype: torch.dtype = bf16, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 60, dtype=dtype)
        self.up = nn.Linear(60, 90, bias=True, dtype=dtype)
        self.head = nn.Linear(60, 40, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(60, dtype=dtype)
        self.register_buffer("scale", torch.ones(8, 50, dtype=dtype))
        if tied:
            self.head.weight = self.embed.weight


def state(model: nn.Module) -> Tensors:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def tuned(base: Mapping[str, Tensor], seed: int, tied: bool = True) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    result = {name: (x + 0.05 * torch.randn(x.shape, generator=generator)).to(x.dtype) for name, x in base.items()}
    if tied:
        result["head.weight"] = result["embed.weight"]
    return result


class Setting:
    """A model merged from three, the base, and an expert of each."""

    def __init__(self, dtype: torch.dtype = bf16, keep: float = 0.1, tied: bool = True) -> None:
        torch.manual_seed(0)
        self.model = Tiny(dtype, tied)
        self.base = state(self.model)
        models = [tuned(self.base, seed, tied) for seed in range(3)]
        merged = {name: torch.stack([m[name].float() for m in models]).mean(0).to(dtype) for name in self.base}
        self.model.load_state_dict(merged)
        self.before = state(self.model)
        self.experts = {
            name: experts.extract_expert(self.base, model, keep=keep) for name, model in zip(NAMES, models, strict=True)
        }

    def unchanged(self) -> None:
        for name, x in state(self.model).items():
            assert_bitwise_equal(x, self.before[name])


@pytest.fixture
def setting() -> Iterator[Setting]:
    made = Setting()
    yield made
    experts._WEARING.clear()


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, bf16, torch.float16])
def test_the_values_of_a_model_that_wears_experts(mode: str, rescale: bool, dtype: torch.dtype) -> None:
    setting = Setting(dtype)
    worn = ExpertSet(setting.model, setting.experts, mode=mode, base=setting.base, rescale=rescale)
    weights = {"code": 0.3, "math": 0.7, "chat": 0.0}
    with worn.active(weights):
        assert worn.on == {"math": 0.7, "code": 0.3}
        now = state(setting.model)
        for name, before in setting.before.items():
            total = before.float()
            active = [(setting.experts[one], weights[one]) for one in ("math", "code")]
            kept = [whole.tensors[name].dense().float() for whole, _ in active]
            if mode == "replace":
                replaced = ((kept[0] != 0) | (kept[1] != 0)) & (before != setting.base[name])
                total = torch.where(replaced, setting.base[name].float(), total)
            for dense, (whole, weight) in zip(kept, active, strict=True):
                total = total + dense * torch.tensor(weight * (whole.about.mu if rescale else 1.0))
            assert_bitwise_equal(now[name], total.to(dtype))
            assert not torch.equal(now[name], before)
    setting.unchanged()
    assert worn.on == {}


def test_a_hundred_switches_end_with_the_same_bits(setting: Setting) -> None:
    worn = ExpertSet(setting.model, setting.experts)
    drawn = random.Random(0)
    for _ in range(100):
        chosen = drawn.sample(NAMES, drawn.randint(0, 3))
        worn.switch({name: drawn.uniform(-2, 2) for name in chosen} or None)
    worn.switch("math")
    assert worn.on == {"math": 1.0}
    worn.switch(None)
    worn.switch(None)
    setting.unchanged()


def test_a_model_is_restored_after_an_exception(setting: Setting) -> None:
    worn = ExpertSet(setting.model, setting.experts)
    with pytest.raises(RuntimeError, match="mine"), worn.active("math"):
        raise RuntimeError("mine")
    setting.unchanged()
    with worn.active("code"):
        assert worn.on == {"code": 1.0}
    setting.unchanged()


def test_a_tied_parameter_is_changed_once(setting: Setting) -> None:
    """The module's state has it under two names, and so has the expert."""
    assert "head.weight" in setting.experts["math"].tensors
    worn = ExpertSet(setting.model, setting.experts, rescale=False)
    with worn.active("math"):
        expected = setting.before["embed.weight"].clone()
        setting.experts["math"].tensors["embed.weight"].apply_(expected)
        assert_bitwise_equal(setting.model.head.weight.detach(), expected)
    setting.unchanged()


def test_an_expert_that_does_not_tie_is_refused_by_a_model_that_does() -> None:
    untied = Setting(tied=False)
    model = Tiny()
    before = state(model)
    with pytest.raises(CheckpointError, match="as one parameter, but the expert 'math' has different values"):
        ExpertSet(model, untied.experts)
    for name, x in state(model).items():
        assert_bitwise_equal(x, before[name])


def test_gradients_and_inference_mode_do_not_matter(setting: Setting) -> None:
    worn = ExpertSet(setting.model, setting.experts)
    with torch.inference_mode(), worn.active("math"):
        assert not torch.equal(setting.model.up.weight, setting.before["up.weight"])
    setting.unchanged()
    assert all(parameter.requires_grad for parameter in setting.model.parameters())


def test_files_of_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = save_family(tmp_path, *family(models=1))
    experts.extract_to_file(*paths, "~/one.safetensors", keep=0.1)
    assert experts.describe("~/one.safetensors")["kept"] > 0
    assert experts.load("~/one.safetensors").nbytes > 0


def test_the_base_may_tie_the_head_that_the_model_has_of_its_own(tmp_path: Path) -> None:
    """Its file has no head; what it stands for is the embedding, as it was when the expert was extracted."""
    torch.manual_seed(0)

    class Untied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(40, 60)
            self.lm_head = nn.Linear(60, 40, bias=False)

    model = Untied()
    embedding = model.embed_tokens.weight.detach().clone()
    for name, tied, tensors in (
        ("base", True, {"embed_tokens.weight": embedding}),
        ("tuned", False, {name: embedding + 0.1 * torch.randn(40, 60) for name in model.state_dict()}),
    ):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    file = tmp_path / "expert.safetensors"
    experts.extract_to_file(tmp_path / "base", tmp_path / "tuned", file, keep=0.1)
    expert = experts.load(file).tensors["lm_head.weight"]
    worn = ExpertSet(model, {"one": file}, mode="replace", base=tmp_path / "base", rescale=False)
    with worn.active("one"):
        expected = torch.where(expert.dense() != 0, embedding, model.lm_head.weight.detach()) + expert.dense()
        assert torch.equal(model.lm_head.weight.detach(), expected)


def test_files_and_objects_can_be_mixed(setting: Setting, tmp_path: Path) -> None:
    base, models = family(models=2)
    paths = save_family(tmp_path, base, models)
    for path, name in zip(paths[1:], ("a", "b"), strict=True):
        experts.extract_to_file(paths[0], path, tmp_path / name, keep=0.05)
    module = nn.Module()
    holder = nn.ParameterDict({name.replace(".", "_"): nn.Parameter(x.clone()) for name, x in models[0].items()})
    module.holder = holder
    with pytest.raises(CheckpointError, match=r"'a' has tensor '.*', which the model lacks"):
        ExpertSet(module, {"a": tmp_path / "a"})
    in_memory = experts.extract_expert(paths[0], models[1], keep=0.05)
    from_file = experts.load(tmp_path / "b")
    assert in_memory.about.tensors == from_file.about.tensors and in_memory.about.mu == from_file.about.mu
    for name, one in in_memory.tensors.items():
        assert_bitwise_equal(one.values, from_file.tensors[name].values)
        assert torch.equal(one.columns.long(), from_file.tensors[name].columns.long())


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base, (one, _) = family(models=2)
    paths = save_family(tmp_path, base, [one], shards=3)
    whole = experts.extract_expert(*paths, keep=0.07)
    pieces = expert_model.pieces
    monkeypatch.setattr(
        expert_model, "pieces", lambda wanted, *, digests: pieces(wanted, digests=digests, piece_bytes=3000)
    )
    cut = experts.extract_expert(*paths, keep=0.07)
    assert cut.about == whole.about
    for name, expert in whole.tensors.items():
        assert_bitwise_equal(cut.tensors[name].values, expert.values)
    experts.extract_to_file(*paths, tmp_path / "e", keep=0.07)
    experts.apply_to_checkpoint(paths[1], tmp_path / "e", tmp_path / "worn", shard_size="40kB")
    monkeypatch.undo()
    experts.apply_to_checkpoint(paths[1], tmp_path / "e", tmp_path / "worn2")
    manifests = [(tmp_path / name / "manifest.json").read_text() for name in ("worn", "worn2")]
    assert manifests[0] == manifests[1]


def test_tensors_that_an_expert_leaves_as_they_are_are_not_counted_as_changed(tmp_path: Path) -> None:
    tensors = {"wide": torch.randn(4, 200), "narrow": torch.randn(20)}
    for name, by in (("base", 0.0), ("tuned", 0.5)):
        (tmp_path / name).mkdir()
        save_file({key: x + by for key, x in tensors.items()}, tmp_path / name / "model.safetensors")
    experts.extract_to_file(tmp_path / "base", tmp_path / "tuned", tmp_path / "e", keep=0.01)
    report = experts.apply_to_checkpoint(tmp_path / "base", tmp_path / "e", tmp_path / "worn")
    assert (report["tensors"], report["changed_tensors"]) == (2, 1)
    assert experts.remove_from_checkpoint(tmp_path / "worn", tmp_path / "back")["changed_tensors"] == 1


def test_a_tied_head_is_not_untied_in_a_file(tmp_path: Path) -> None:
    embedding = torch.randn(40, 60)
    names = ("embed_tokens.weight", "lm_head.weight")
    for folder, tied, tensors in (
        ("base", True, [embedding, embedding.clone()]),
        ("untied", False, [embedding + 0.1 * torch.randn(40, 60) for _ in names]),
        ("tied", False, [(embedding + 0.1).clone() for _ in names]),
    ):
        (tmp_path / folder).mkdir()
        save_file(dict(zip(names, tensors, strict=True)), tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    for name, model, include in (("a", "untied", ()), ("b", "tied", "lm_head"), ("c", "tied", ())):
        experts.extract_to_file(tmp_path / "base", tmp_path / model, tmp_path / name, keep=0.1, include=include)
    for name in ("a", "b"):
        with pytest.raises(CheckpointError, match="belongs to a model that does not tie them"):
            experts.apply_to_checkpoint(tmp_path / "base", tmp_path / name, tmp_path / "worn")
    assert not (tmp_path / "worn").exists()
    experts.apply_to_checkpoint(tmp_path / "base", tmp_path / "c", tmp_path / "worn")
    head, embedded = (load_file(tmp_path / "worn" / "model.safetensors")[name] for name in names)
    assert torch.equal(head, embedded) and not torch.equal(head, embedding)


def test_the_card_says_how_to_do_it_again(tmp_path: Path) -> None:
    paths = save_family(tmp_path / "my models", *family(models=1))
    file, worn, moved = tmp_path / "e", tmp_path / "worn", tmp_path / "old bits"
    experts.extract_to_file(*paths, file, keep=0.1)
    experts.apply_to_checkpoint(paths[1], file, worn, scale=0.5, rescale=False)
    (worn / "expert.restore").rename(moved)
    experts.remove_from_checkpoint(worn, tmp_path / "back", restore=moved)
    for folder, command in (
        (worn, f"apply '{paths[1]}' {file} -o {worn} --scale 0.5 --no-rescale"),
        (tmp_path / "back", f"remove {worn} -o {tmp_path / 'back'} --restore '{moved}'"),
    ):
        assert f"fastmerge expert {command}\n" in (folder / "README.md").read_text()


def test_a_tensor_that_does_not_lie_in_one_piece_is_copied_once() -> None:
    class Counted(StateDictSource):
        views = 0

        def view(self, info: TensorInfo) -> Tensor:
            self.views += 1
            return super().view(info)

    x = torch.randn(50, 40).T
    source = Counted("model", {"w": x})
    found = list(expert_model.pieces([("w", [(source, source.tensors["w"])])], digests=True, piece_bytes=1000))
    assert len(found) > 5 and source.views == 1
    assert torch.equal(torch.cat([piece.tensors[0] for piece in found]), x)


def test_a_lone_pattern_is_one_pattern(setting: Setting) -> None:
    for options, left in (
        ({"include": "up"}, {"up.weight", "up.bias"}),
        ({"exclude": "norm|embed|head|up"}, {"scale"}),
    ):
        found = experts.extract_expert(setting.base, setting.base, keep=0.1, **options)  # type: ignore[arg-type]
        assert set(found.tensors) == left


class TestRefusals:
    """Each with a sentence, and the model is as it was."""

    @pytest.fixture(autouse=True)
    def _setting(self, setting: Setting) -> Iterator[None]:
        self.setting = setting
        self.model = setting.model
        self.given: dict[str, Any] = dict(setting.experts)
        yield

    def refused(self, message: str, **options: Any) -> None:
        with pytest.raises(FastmergeError, match=message):
            ExpertSet(self.model, self.given, **options)
        self.setting.unchanged()

    def test_arguments(self) -> None:
        self.refused("mode must be one of", mode="mix")
        self.refused("needs the values of the base", mode="replace")
        self.given = {}
        self.refused("experts is empty")
        with pytest.raises(ArgumentTypeError, match=r"must be a torch\.nn\.Module"):
            ExpertSet({}, self.setting.experts)  # type: ignore[arg-type]
        for given, message in ((["math"], "must be a mapping"), ({"math": 3}, "the expert 'math' is a int")):
            with pytest.raises(ArgumentTypeError, match=message):
                ExpertSet(self.model, given)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="keep=x is outside"):
            experts.extract_expert(self.setting.base, self.setting.base, keep="x")  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="include holds 3, which is not a regular expression"):
            experts.extract_expert(self.setting.base, self.setting.base, include=[3])  # type: ignore[list-item]

    def test_another_shape(self) -> None:
        self.model = Tiny()
        self.model.up = nn.Linear(60, 91, dtype=bf16)
        with pytest.raises(CheckpointError, match=r"'up.weight' has the shape \[91, 60\] in the model"):
            ExpertSet(self.model, self.given)

    def test_another_base_among_the_experts(self) -> None:
        other = {name: x + 1 for name, x in self.setting.base.items()}
        self.given["stranger"] = experts.extract_expert(other, tuned(other, 5), keep=0.1)
        self.refused("'math' and 'stranger' come from different bases")

    def test_another_base_than_the_one_given(self) -> None:
        other = dict(self.setting.base) | {"up.bias": self.setting.base["up.bias"] + 1}
        for mode in ("add", "replace"):
            self.refused(
                "is not the base that the expert 'math' was extracted with: 'up.bias' differs", mode=mode, base=other
            )
        del other["up.bias"]
        self.refused("'up.bias' of the experts is missing in the base", mode="replace", base=other)

    def test_what_cannot_be_changed_in_place(self) -> None:
        self.model.up.weight.data = torch.zeros(60, 90, dtype=bf16).T
        with pytest.raises(ArgumentError, match="'up.weight' of the model is not contiguous"):
            ExpertSet(self.model, self.given)
        with pytest.raises(ArgumentTypeError, match="float64"):
            ExpertSet(Tiny(torch.float64), self.given)
        with pytest.raises(ArgumentTypeError, match="meta"):
            ExpertSet(Tiny().to("meta"), self.given)

    def test_tensors_that_overlap_without_being_one(self) -> None:
        """A fused matrix and a view of some of its rows: neither's old bits could be put back."""

        class Fused(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("qkv", torch.randn(6, 10))
                self.register_buffer("key", self.qkv[2:4])

        model = Fused()
        base = state(model)
        expert = experts.extract_expert(base, tuned(base, 0, tied=False), keep=0.5)
        with pytest.raises(ArgumentError, match="'qkv' and 'key' share memory"):
            ExpertSet(model, {"one": expert})

    def test_names_and_weights(self) -> None:
        worn = ExpertSet(self.model, self.given)
        for weights, message in (
            ("maths", "there is no expert 'maths'; this set has math, code, chat"),
            ({"math": float("nan")}, "not finite"),
            ({"math": "1"}, "must be a number"),
            (["math"], "must be a mapping"),
        ):
            with pytest.raises(FastmergeError, match=message), worn.active(weights):  # type: ignore[arg-type]
                raise AssertionError("not reached")
            with pytest.raises(FastmergeError, match=message):
                worn.switch(weights)  # type: ignore[arg-type]
            self.setting.unchanged()

    def test_applied_twice(self) -> None:
        worn, other = ExpertSet(self.model, self.given), ExpertSet(self.model, self.given)
        with worn.active("math"):
            with pytest.raises(ArgumentError, match="wears experts already"), worn.active("math"):
                raise AssertionError("not reached")
            with pytest.raises(ArgumentError, match="of another ExpertSet"):
                other.switch("math")
        self.setting.unchanged()
        other.switch("code")
        other.switch(None)
        self.setting.unchanged()

    def test_switched_off_inside_a_block(self) -> None:
        worn = ExpertSet(self.model, self.given)
        with pytest.raises(ArgumentError, match="taken off inside the `with` block"), worn.active("math"):
            worn.switch(None)
        self.setting.unchanged()

    def test_weights_changed_in_between(self) -> None:
        worn = ExpertSet(self.model, self.given)
        worn.switch({"math": 1.0, "code": 0.5})
        now = state(self.model)
        place = self.setting.experts["math"].tensors["up.weight"].columns[7, 2].item()
        with torch.no_grad():
            self.model.up.weight[7, place] += 1
        changed = state(self.model)
        with pytest.raises(ArgumentError, match=r"1 values of 'up\.weight' are not what was put there"):
            worn.switch(None)
        for name, x in state(self.model).items():
            assert_bitwise_equal(x, changed[name])
        with torch.no_grad():
            self.model.up.weight.copy_(now["up.weight"])
        worn.switch(None)
        self.setting.unchanged()

    def test_the_old_bits_can_be_put_back_over_changed_weights(self) -> None:
        worn = ExpertSet(self.model, self.given)
        with pytest.raises(ArgumentError, match="put_back"), worn.active({"math": 1.0, "chat": 1.0}):
            for parameter in self.model.parameters():
                parameter.data.mul_(2)
        worn.put_back()
        assert worn.on == {}
        for name, x in state(self.model).items():
            kept = [self.setting.experts[each].tensors[name].dense() != 0 for each in ("math", "chat")]
            assert torch.equal(x[kept[0] | kept[1]], self.setting.before[name][kept[0] | kept[1]])

    def test_a_model_that_was_moved(self) -> None:
        worn = ExpertSet(self.model, self.given)
        self.model.up.weight.data = self.model.up.weight.data.clone()
        with pytest.raises(ArgumentError, match=r"'up\.weight' was moved or given other memory"):
            worn.switch("math")
        self.setting.unchanged()

    @pytest.mark.parametrize("dtype", [bf16, torch.float32, torch.float64])
    def test_the_old_bits_are_put_back_where_the_model_was_moved_to(self, dtype: torch.dtype) -> None:
        worn = ExpertSet(self.model, self.given)
        with pytest.raises(ArgumentError, match=r"put_back\(\)"), worn.active("math"):
            self.model.to(dtype)
            for parameter in self.model.parameters():
                parameter.data = parameter.data.clone()
            self.model.up.weight.data = self.model.up.weight.data.T.contiguous().T
        assert worn.on == {"math": 1.0}
        worn.put_back()
        assert worn.on == {}
        for name, x in state(self.model).items():
            assert torch.equal(x, self.setting.before[name].to(dtype)) and x.dtype == dtype

    def test_weights_that_were_loaded_in_their_place_are_left_alone(self) -> None:
        worn = ExpertSet(self.model, self.given)
        worn.switch({"math": 1.0, "code": 1.0})
        loaded = {name: x + 1 for name, x in self.setting.before.items()}
        self.model.load_state_dict(loaded, assign=True)
        with pytest.raises(ArgumentError, match="cannot be taken off"):
            worn.switch(None)
        worn.put_back()
        assert worn.on == {}
        for name, x in state(self.model).items():
            assert torch.equal(x, loaded[name])

    def test_the_old_bits_of_what_has_become_something_else(self) -> None:
        worn = ExpertSet(self.model, self.given)
        worn.switch("math")
        now = state(self.model)
        self.model.norm.bias.data = torch.zeros(61, dtype=bf16)
        with pytest.raises(ArgumentError, match=r"'norm.bias' cannot be put back: it was torch.bfloat16\[60\]"):
            worn.put_back()
        assert torch.equal(self.model.up.weight, now["up.weight"]) and worn.on == {"math": 1.0}

    def test_a_parameter_that_was_replaced(self) -> None:
        """Experts put onto the old one would not be seen by the model."""
        worn = ExpertSet(self.model, self.given)
        self.model.load_state_dict(self.setting.before, assign=True)
        with pytest.raises(ArgumentError, match="was moved or given other memory"):
            worn.switch("math")
        worn = ExpertSet(self.model, self.given)
        self.model.up = nn.Linear(60, 90, dtype=bf16)
        with pytest.raises(ArgumentError, match=r"'up\.\w+' was moved or given other memory"):
            worn.switch("math")
        assert worn.on == {}

    def test_a_failure_on_the_way_leaves_the_model_as_it_was(self, monkeypatch: pytest.MonkeyPatch) -> None:
        worn = ExpertSet(self.model, self.given)
        monkeypatch.setattr(experts, "expert_apply_", lambda *args, **options: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            worn.switch("math")
        monkeypatch.undo()
        self.setting.unchanged()
        worn.switch("math")
        worn.switch(None)
        self.setting.unchanged()


def test_a_model_that_wears_experts_can_be_dropped() -> None:
    setting = Setting()
    worn = ExpertSet(setting.model, setting.experts)
    worn.switch("math")
    gone = weakref.ref(setting.model)
    del setting.model
    gc.collect()
    assert gone() is None and not experts._WEARING
    worn.switch(None)
    with pytest.raises(ArgumentError, match="the model of this set is gone"):
        worn.switch("code")


def test_reading_ahead_hands_errors_on_and_can_be_left_early() -> None:
    def numbers() -> Iterator[int]:
        yield from range(5)
        raise ValueError("at the end")

    seen = []
    with pytest.raises(ValueError, match="at the end"), ahead(numbers()) as items:
        seen.extend(items)
    with ahead(iter(range(1000))) as items:
        assert next(items) == 0
    assert ops.expert_k(100, 0.05) == 5
    assert isinstance(Setting().experts["math"], ModelExpert)
