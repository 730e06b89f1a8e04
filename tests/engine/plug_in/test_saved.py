"""A user's model with expert layers, saved and loaded: training goes on as if it had never stopped."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from safetensors.torch import load_file
from torch import nn

from foreroute.engine.config import Builder, Keys, MoEConfig, RouteWeights
from foreroute.engine.errors import UserError
from foreroute.engine.plug_in import experts_of, load_pretrained, replace_feed_forwards, save_pretrained
from foreroute.engine.plug_in.live_experts import LiveExperts
from foreroute.engine.plug_in.saved.training import loss_scale, set_loss_scale

SYMBOLS, WIDTH, EXPERTS, K, ROWS, LENGTH = 11, 16, 6, 2, 12, 9
MOE = MoEConfig(experts=EXPERTS, expert_width=12, ngram=2, rows=64, builder=Builder.random, shared_width=8)
ADAM = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-3}  # a smaller eps makes rounding noise whole steps


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.experts = nn.Linear(WIDTH, WIDTH)  # a name as ours, of nothing of ours
        self.drop = nn.Dropout(0.2)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 40), nn.ReLU(), nn.Linear(40, WIDTH))

    def forward(self, x):
        x = x + self.experts(self.drop(self.mix(x.cumsum(1) / LENGTH)))
        return x + self.mlp(x)


class Theirs(nn.Module):
    """Tied weights, a frozen parameter, one that no pass uses, and a buffer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, SYMBOLS)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.rand(WIDTH), requires_grad=False)
        self.unused = nn.Parameter(torch.rand(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, ids, targets):
        self.calls += 1
        x = self.embed(ids) * self.scale
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def make(seed=0, moe=MOE, kind=Theirs, pattern=r"layers\.\d+\.mlp", **options):
    torch.manual_seed(seed)
    model = kind()
    options = {"width": WIDTH, "vocab_size": SYMBOLS, "k": K, "dropout": 0.1, "init_std": 0.3, "seed": seed, **options}
    replace_feed_forwards(model, pattern, moe=moe, **options)
    return model


def batch(step):
    ids = torch.randint(0, SYMBOLS, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


class Training:
    """A model with its optimizer and scheduler in plain PyTorch."""

    def __init__(self, seed=0, optimizer=torch.optim.Adam, groups=1, maker=make, **options):
        self.model = maker(seed, **options)
        params = list(self.model.parameters())
        split = [params[:3], params[3:]] if groups == 2 else [params]
        options = {"momentum": 0.9, "lr": 0.01} if optimizer is torch.optim.SGD else {"lr": 0.01}
        options = ADAM if optimizer in (torch.optim.Adam, torch.optim.AdamW) else options
        self.optimizer = optimizer([{"params": part} for part in split], **options)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4], gamma=0.5)

    def steps(self, first, last):
        losses = []
        for step in range(first, last):
            ids, targets = batch(step)
            with experts_of(self.model).planned(ids):
                loss = self.model(ids, targets)
                loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    def save(self, folder, **options):
        return save_pretrained(self.model, folder, optimizer=self.optimizer, scheduler=self.scheduler, **options)

    def load(self, folder, **options):
        load_pretrained(self.model, folder, optimizer=self.optimizer, scheduler=self.scheduler, **options)

    def weights(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def same(got, want):
    return got.keys() == want.keys() and all(torch.equal(value, want[name]) for name, value in got.items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder after three steps, the training's next losses and its weights after them."""
    training = Training()
    training.steps(0, 3)
    experts_of(training.model).k = 3
    at_save = copy.deepcopy(training.weights())
    folder = training.save(tmp_path_factory.mktemp("saved") / "model")
    losses = training.steps(3, 6)
    return folder, at_save, losses, training.weights()


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved[0], tmp_path / "model")


def test_training_goes_on_bit_for_bit(saved):
    path, at_save, losses, weights = saved
    training = Training(seed=9)
    training.load(path)
    assert same(training.weights(), at_save)
    assert training.steps(3, 6) == losses and same(training.weights(), weights)
    assert experts_of(training.model).k == 3 and training.model.calls == 6


@pytest.mark.parametrize("what", ["exp_avg", "exp_avg_sq", "step", "lr", "k", "passes", "random", "schedule"])
def test_a_change_of_what_is_saved_is_noticed(what, saved):
    """Negative control: each of these decides the steps that follow."""
    path, _, losses, weights = saved
    training = Training(seed=9)
    training.load(path)
    state = training.optimizer.state[training.model.head.bias]
    if what == "lr":
        training.optimizer.param_groups[0]["lr"] *= 1.001
    elif what == "k":
        experts_of(training.model).k = 2
    elif what == "passes":
        experts_of(training.model)._passes += 1
    elif what == "random":
        torch.manual_seed(1)
    elif what == "schedule":
        training.scheduler.last_epoch += 1
    else:
        state[what] *= 1.01
    assert training.steps(3, 6) != losses or not same(training.weights(), weights)


def test_other_groups_of_the_optimizer_take_the_same_state(saved):
    path, _, losses, weights = saved
    training = Training(seed=9, groups=2)
    training.load(path)
    assert training.steps(3, 6) == losses and same(training.weights(), weights)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_other_optimizers_go_on(optimizer, tmp_path):
    training = Training(optimizer=optimizer)
    training.steps(0, 2)
    training.save(tmp_path / "model")
    want = training.steps(2, 4)
    again = Training(seed=9, optimizer=optimizer)
    again.load(tmp_path / "model")
    assert again.steps(2, 4) == want and same(again.weights(), training.weights())


ROUTERS = [
    {"router": "learned", "balance_loss": 0.5},
    {"router": "sigmoid_bias"},
    {"router": "fresh"},
    {"keys": Keys.shuffled},
    {"weights": RouteWeights.live, "copy_experts": 1, "constant_experts": 1},
]


@pytest.mark.parametrize("options", ROUTERS, ids=lambda options: "-".join(map(str, options.values())))
def test_every_kind_of_router_goes_on(options, tmp_path):
    """Live ones with a state of their own, planned ones that draw, and gates."""

    def steps(training, first, last):
        experts, losses = experts_of(training.model), []
        live = isinstance(experts, LiveExperts)
        for step in range(first, last):
            ids, targets = batch(step)
            with experts.planned(ids):
                loss = training.model(ids, targets)
            (loss + experts.auxiliary_loss() if live else loss).backward()
            training.optimizer.step()
            training.optimizer.zero_grad()
            losses.append(loss.item())
            if live:
                experts.after_step()
        return losses

    moe = replace(MOE, **options)
    training = Training(moe=moe)
    steps(training, 0, 3)
    training.save(tmp_path / "model")
    want = steps(training, 3, 6)
    again = Training(seed=9, moe=moe)
    again.load(tmp_path / "model")
    assert steps(again, 3, 6) == want
    assert same(again.weights(), training.weights())
    assert same(dict(again.model.named_buffers()), dict(training.model.named_buffers()))


def test_a_stepped_training_goes_back(saved, tmp_path):
    """Into an optimizer that has a state already; and before the first step there is none."""
    path, _, losses, weights = saved
    training = Training(seed=9)
    training.save(tmp_path / "first")
    want = training.steps(0, 2)
    training.load(path)
    assert training.steps(3, 6) == losses and same(training.weights(), weights)
    training.load(tmp_path / "first")
    assert training.steps(0, 2) == want


def test_weights_alone(saved, tmp_path):
    path, at_save, *_ = saved
    training = Training(seed=9)
    training.steps(0, 2)
    training.load(path, weights_only=True)
    assert same(training.weights(), at_save) and training.scheduler.last_epoch == 2
    assert all(not state["exp_avg"].any() and state["step"] == 0 for state in training.optimizer.state.values())
    evaluated = make(seed=9)
    load_pretrained(evaluated, path)
    assert same(dict(evaluated.named_parameters()), at_save)
    training.save(tmp_path / "small", weights_only=True)
    stored = load_file(tmp_path / "small/foreroute-00000.safetensors")
    assert {key.split("/")[0] for key in stored} == {"weight", "buffer", "experts"}
    with pytest.raises(UserError, match=r"small: was saved without an optimizer: load it with weights_only=True"):
        training.load(tmp_path / "small")


def test_the_models_own_parameters_are_a_file_for_others(saved):
    path, at_save, *_ = saved
    own = load_file(path / "model.safetensors")
    theirs = Theirs()
    missing, unexpected = theirs.load_state_dict(own, strict=False)
    assert unexpected == []
    assert [name for name in missing if ".mlp." not in name] == ["head.weight"]  # tied to embed.weight
    assert set(own) == {name for name in [*at_save, "calls"] if ".mlp." not in name}
    assert all(torch.equal(own[name], at_save[name]) for name in own if name != "calls") and own["calls"] == 3


class WithFiles(Theirs):
    """A model that writes its own files, as those of transformers."""

    def save_pretrained(self, folder, state_dict):
        assert state_dict["head.weight"] is state_dict["embed.weight"]
        (folder / "config.json").write_text(json.dumps({"names": list(state_dict)}))
        torch.save(None, folder / "theirs.bin")


def test_a_model_writes_its_own_files(tmp_path):
    model = make(kind=WithFiles)
    save_pretrained(model, tmp_path / "model")
    (tmp_path / "model/config.json").write_text("{}")  # only files of weights have a checksum
    load_pretrained(make(seed=9, kind=WithFiles), tmp_path / "model")
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == [
        "config.json",
        "foreroute-00000.safetensors",
        "foreroute.json",
        "theirs.bin",
    ]
    save_pretrained(model, tmp_path / "model")
    names = json.loads((tmp_path / "model/config.json").read_text())["names"]
    assert names == [name for name in model.state_dict() if ".mlp." not in name]


def test_a_folder_is_replaced_and_keeps_files_of_others(folder):
    (folder / "tokenizer.json").write_text("theirs")
    (folder / "runs").mkdir()
    (folder / "runs/log").write_text("theirs too")
    save_pretrained(make(kind=WithFiles), folder)
    assert (folder / "tokenizer.json").read_text() == "theirs" and (folder / "runs/log").exists()
    assert not (folder / "model.safetensors").exists()  # ours before, and not written now
    load_pretrained(make(seed=9, kind=WithFiles), folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match=r"holds other files and no foreroute.json: must be a new folder"):
        save_pretrained(make(), tmp_path)
    with pytest.raises(UserError, match=r"thesis.tex: is a file: must be a folder"):
        save_pretrained(make(), tmp_path / "thesis.tex")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_failed_save_leaves_the_folder_before(folder, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("foreroute.engine.checkpoint.files.write_manifest", fail)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(make(), folder)
    monkeypatch.undo()
    Training(seed=9).load(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, lambda file: file.unlink()])
@pytest.mark.parametrize("name", ["foreroute.json", "foreroute-00000.safetensors", "model.safetensors"])
def test_a_damaged_file_is_named_and_nothing_is_loaded(name, damage, folder):
    damage(folder / name)
    training = Training(seed=9)
    before = training.weights()
    with pytest.raises(UserError, match=rf"^{folder / name}: [^\n]+$"):
        training.load(folder)
    assert same(training.weights(), before) and not training.optimizer.state


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"moe": replace(MOE, experts=4)}, "was saved with moe.experts=6: must be so here, not 4"),
        ({"moe": replace(MOE, ngram=3)}, "was saved with moe.ngram=2: must be so here, not 3"),
        ({"moe": replace(MOE, weights=RouteWeights.live)}, "moe.weights=table: must be so here, not live"),
        ({"pattern": r"layers\.1\.mlp"}, r"has expert layers layers.0.mlp, layers.1.mlp: must be those of this model"),
        ({"optimizer": torch.optim.SGD}, "saved with the optimizer Adam: must be so here, not SGD"),
    ],
)
def test_another_model_is_refused_in_one_line(options, line, saved):
    training = Training(seed=9, **options)
    before = training.weights()
    with pytest.raises(UserError, match=rf"^{saved[0]}: [^\n]*{line}"):
        training.load(saved[0])
    assert same(training.weights(), before)


def test_other_mistakes_are_named(saved, tmp_path):
    with pytest.raises(UserError, match="the model has no expert layers: call replace_feed_forwards first"):
        save_pretrained(Theirs(), tmp_path / "model")
    with pytest.raises(UserError, match=r"nowhere/foreroute.json: No such file or directory"):
        load_pretrained(make(), tmp_path / "nowhere")
    model = make()
    with pytest.raises(UserError, match="optimizer: 1 of its parameters are not the model's"):
        save_pretrained(model, tmp_path / "model", optimizer=torch.optim.Adam([nn.Parameter(torch.ones(2))]))
    model.head = nn.Linear(WIDTH, SYMBOLS + 1)
    with pytest.raises(UserError, match=r"does not fit this model: weight/head.weight has shape none in the check"):
        load_pretrained(model, saved[0])
    unscheduled = Training()
    unscheduled.scheduler = None
    unscheduled.save(tmp_path / "model")
    with pytest.raises(UserError, match=r"was saved without a scheduler: save it with scheduler="):
        Training(seed=9).load(tmp_path / "model")


def test_several_calls_of_replace_feed_forwards(tmp_path):
    """As of an encoder and a decoder: two planners in one model."""

    def two(seed):
        model = make(seed, pattern=r"layers\.0\.mlp")
        options = {"width": WIDTH, "vocab_size": SYMBOLS, "k": 1, "seed": seed + 5}
        second = replace_feed_forwards(model, r"layers\.1\.mlp", moe=replace(MOE, experts=4), **options)
        return model, second

    model, second = two(0)
    save_pretrained(model, tmp_path / "model")
    again, loaded = two(9)
    load_pretrained(again, tmp_path / "model")
    assert same(again.state_dict(), model.state_dict()) and loaded.tables == second.tables


@pytest.mark.transformers
def test_a_model_of_transformers_has_its_own_files(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    config = transformers.LlamaConfig(vocab_size=SYMBOLS, hidden_size=WIDTH, intermediate_size=32, **sizes)

    def replaced(model, seed):
        options = {"width": WIDTH, "vocab_size": SYMBOLS, "k": K, "seed": seed}
        experts = replace_feed_forwards(model, r"model\.layers\.\d\.mlp", moe=MOE, **options)
        experts.attach(model, "input_ids", layout="BQ")
        return model, torch.optim.Adam(model.parameters(), **ADAM)

    def step(model, adam):
        loss = model(input_ids=batch(0)[0], labels=batch(0)[0]).loss
        loss.backward()
        adam.step()
        adam.zero_grad()
        return loss.item()

    model, adam = replaced(transformers.LlamaForCausalLM(config), 0)
    step(model, adam)
    save_pretrained(model, tmp_path / "model", optimizer=adam)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    own = {name: p for name, p in model.named_parameters() if ".mlp." not in name}
    assert all(torch.equal(theirs.get_parameter(name), value) for name, value in own.items())
    want = step(model, adam), step(model, adam)
    again, other = replaced(theirs, 9)
    load_pretrained(again, tmp_path / "model", optimizer=other)
    assert (step(again, other), step(again, other)) == want


def test_a_dynamic_loss_scale_goes_on():
    """As of DeepSpeed with fp16."""
    options = {"scale_window": 10, "min_scale": 1, "delayed_shift": 2, "consecutive_hysteresis": False}
    scaler = DynamicLossScaler(init_scale=2**16, **options)
    scaler.cur_scale, scaler.cur_hysteresis, scaler.last_overflow_iter = 2**15, 1, 3
    scaler.update_scale(False)
    again, static = DynamicLossScaler(init_scale=2**16, **options), LossScaler(1)
    set_loss_scale(again, loss_scale(scaler))
    assert vars(again) == vars(scaler) and (again.cur_scale, again.cur_iter) == (2**15, 1)
    set_loss_scale(static, loss_scale(scaler))
    set_loss_scale(again, loss_scale(static))
    assert static.cur_scale == 1 and again.cur_scale == 2**15
