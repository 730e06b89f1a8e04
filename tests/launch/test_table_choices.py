"""conf/ngram_tables/: published forms of n-gram tables are choices, `ngram_tables=NAME`."""

import pytest
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException

from foreroute.engine.config import Config, NgramEntry, NgramKeys, NgramTablesConfig
from foreroute.engine.model.build import build_model
from foreroute.engine.ngram_tables.entries import ENGRAM, PER_LAYER, Added, Gated
from foreroute.launch.start.config_files import compose_run
from foreroute.launch.start.help import CONF, choices_of, groups_of

CHOICES = sorted(path.stem for path in (CONF / "ngram_tables").glob("*.yaml"))
SMALL = ["experiment=debug", "ngram_tables.rows=50"]
FORMS = {"engram": (NgramKeys.engram, Gated), "qwen": (NgramKeys.qwen, Gated), "over_encoding": (NgramKeys.hash, Added)}


def composed(*options):
    ConfigStore.instance().store("schema", Config)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose_run(list(options))


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_makes_its_tables(name):
    config = composed(*SMALL, f"ngram_tables={name}")
    model = build_model(config, 40)
    keys, entry = FORMS[name]
    assert config.ngram_tables.keys is keys and config.ngram_tables.rows == 50
    assert [type(found) for found in model.ngram_tables.entries] == [entry]
    assert all(50 <= found.rows / found.heads < 200 for found in model.table_keys)
    assert config.ngram_tables.places == ([None] if name == "over_encoding" else [1])


def test_forms_differ_as_published():
    gates = [build_model(composed(*SMALL, f"ngram_tables={name}"), 40) for name in ("engram", "qwen")]
    for model, form in zip(gates, (ENGRAM, PER_LAYER), strict=True):
        (entry,) = model.ngram_tables.entries
        assert (entry.key.bias is not None) == form.bias and entry.x_norm.eps == form.eps


def test_a_choice_replaces_and_options_come_after_it():
    config = composed(*SMALL, "ngram_tables=qwen", "ngram_tables.entry=gate", "ngram_tables.layers=[0,1]")
    assert config.ngram_tables.entry is NgramEntry.gate and config.ngram_tables.layers == [0, 1]
    assert composed("experiment=debug").ngram_tables == NgramTablesConfig()


def test_choices_are_told_and_wrong_ones_refused():
    assert set(choices_of(CONF / "ngram_tables")) == set(FORMS)
    assert all("ngram_tables" in groups_of(CONF / f"{program}.yaml") for program in ("train", "certify"))
    with pytest.raises(MissingConfigException, match="ngram_tables/engrm"):
        composed(*SMALL, "ngram_tables=engrm")
