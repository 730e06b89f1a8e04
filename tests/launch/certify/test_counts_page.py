"""The page of a certificate says what was counted: every number on it against the counts themselves."""

import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from foreroute.engine.certificate.counts.exact import certify
from foreroute.engine.certificate.counts.layout import Layout, Trips
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import replay
from foreroute.engine.certificate.counts.traffic import hops, leaving
from foreroute.engine.config import (
    Config,
    Corpus,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    Growth,
    ModelConfig,
    MoEConfig,
    NgramTablesConfig,
    ParallelConfig,
    ScheduleConfig,
    Tokens,
    TrainConfig,
)
from foreroute.engine.config.enums import ExchangeKind
from foreroute.engine.data.corpus import PreparedCorpus
from foreroute.engine.data.tokens.byte_values import ByteVocab
from foreroute.engine.ngram_tables.tables import table_keys
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import RouterInputs
from foreroute.launch.certify.counts_page import certificate_page, counts_verdict
from foreroute.launch.page.html_file import html
from foreroute.launch.page.markdown_file import markdown
from foreroute.launch.page.parts import Bars, Curve, Section, Table
from foreroute.launch.page.terminal import print_top

SYMBOLS, STREAMS, SEGMENT, STEPS = 7, 8, 12, 9
PLACE = Placement(world_size=8, expert_ranks=4, ranks_per_node=2)
TOKENS = STREAMS * SEGMENT // 8


def make(**changes):
    config = Config(
        corpus=CorpusConfig(Corpus.file, "<script>alert(1)</script>"),
        data=DataConfig(STREAMS, SEGMENT),
        model=ModelConfig(layers=2, width=6),
        moe=MoEConfig(experts=8, ngram=2, rows=40),
        schedule=ScheduleConfig(Growth.linear, 1, 3),
        train=TrainConfig(steps=STEPS, name="tried"),
        eval=EvalConfig(k=[1]),
    )
    config = replace(config, **changes)
    ids = np.random.default_rng(0).integers(0, SYMBOLS, STREAMS * (5 * SEGMENT + 1)).astype(np.uint8)
    routers = HashedRouter.build(config.moe, RouterInputs(SYMBOLS, 1, 2, ids))
    corpus = PreparedCorpus(
        ids, ByteVocab(Tokens.bytes, bytes(range(SYMBOLS))), "ab" * 32, [], {"cuts": [0, ids.size, ids.size, ids.size]}
    )
    return config, corpus, routers


def page_of(place=PLACE, further=(), sample=1, **changes):
    config, corpus, routers = make(**changes)
    found = certify(Layout(config, place), corpus.ids, routers, sample=sample)
    return found, certificate_page(found, Layout(config, place), corpus, further)


def parts(page, title, kind):
    (section,) = [section for section in page.sections if section.title == title]
    return [part for part in section.parts if isinstance(part, kind)]


def counted(config, corpus, routers, place=PLACE):
    """All steps of a run with their counts, repeated steps as often as they occur."""
    for counts in replay(Layout(config, place), corpus.ids, routers, range(STEPS)):
        yield from [(step, counts) for step in counts.steps.tolist()]


def sent_bytes(counts, kind, near=None):
    """Bytes that leave each rank in a step; forward and backward, rows of width 6 in fp32."""
    rows = leaving(hops(counts, kind, PLACE, TOKENS), Trips(2, 2), near).sum(axis=(0, 1)) * 6 * 4
    return rows.ravel().tolist()


def test_the_rows_on_the_page_are_the_counts():
    found, page = page_of()
    table, idle = parts(page, "Rows", Table)
    assert table.header == ["rows", "k", "steps", "mean", "p99", "max", "load", "worst step"]
    lines = {(row[0], row[1]): row[2:] for row in table.rows if row}
    by_k, empty = {}, Counter()
    for step, counts in counted(*make()):
        computed = counts.computed_ymgP.ravel().tolist()
        by_k.setdefault(str(counts.k), []).append((step, computed))
        by_k.setdefault("all", []).append((step, computed))
        empty["rank"] += counts.received_ymgP.min() == 0
        empty["expert"] += counts.count_ymgE.min() == 0
    assert len(by_k) == 4 and len(lines) == 3 * len(by_k)
    for k, of_steps in by_k.items():
        values = sorted(value for _, computed in of_steps for value in computed)
        mean, most = sum(values) / len(values), values[-1]
        worst = 1 + min(step for step, computed in of_steps if max(computed) == most)
        p99 = values[-(-99 * len(values) // 100) - 1]
        want = [f"{len(of_steps)}", f"{mean:,.0f}", str(p99), str(most), f"{most / mean:.2f}", str(worst)]
        assert lines["computed by a rank", k] == want
    assert [row[1:3] for row in idle.rows] == [[str(empty["rank"]), "9"], [str(empty["expert"]), "9"]]
    assert empty["expert"] > 0 and found.whole.idle_expert.first_step is not None
    assert idle.rows[1][3] == str(found.whole.idle_expert.first_step)
    values = {figure.label: figure.value for figure in page.figures}
    assert values["Rows of the busiest rank"] == lines["computed by a rank", "all"][3]
    worst = max(float(lines["computed by a rank", k][4]) for k in by_k if k != "all")
    assert f"at most {worst:.2f} x the mean of the same k" in page.figures[0].note
    assert values["Steps with an idle expert"] == str(empty["expert"])


@pytest.mark.parametrize("exchange", [ExchangeKind.tokens, ExchangeKind.gather, ExchangeKind.auto])
def test_the_key_figures_are_of_the_exchange_that_the_run_uses(exchange):
    """With auto it changes from k to k: neither kind alone gives the figure."""
    parallel = ParallelConfig(exchange=exchange, link_gb_per_s=1e-3)
    schedule = ScheduleConfig(Growth.linear, 1, 8)
    found, page = page_of(parallel=parallel, schedule=schedule)
    used = {part.k: part.exchange for part in found.by_k}
    assert len(set(used.values())) == (2 if exchange is ExchangeKind.auto else 1)
    sent, between = [], []
    for _, counts in counted(*make(schedule=schedule)):
        every = sent_bytes(counts, used[counts.k])
        near = sent_bytes(counts, used[counts.k], PLACE.same_node_PP)
        sent += every
        between += [a - b for a, b in zip(every, near, strict=True)]
    figures = {figure.label: figure for figure in page.figures}
    for label, values in (("Bytes a rank sends", sent), ("Bytes between nodes", between)):
        mean, most = sum(values) / len(values) / 1e3, max(values) / 1e3
        assert float(figures[label].value.removesuffix(" kB")) == pytest.approx(mean, rel=0.006)
        assert float(figures[label].note.split("at most ")[1].split(" kB")[0]) == pytest.approx(most, rel=0.006)
    (table,) = parts(page, "Bytes", Table)
    marked = {(row[0].rstrip("*"), row[1]) for row in table.rows if row and row[0].endswith("*")}
    want = {(kind, str(k)) for k, kind in used.items()}
    if len(set(used.values())) == 1:
        want |= {(exchange.name, "all")}
    assert marked == want


def test_the_charts_show_the_series_and_the_means():
    found, page = page_of()
    (load,) = parts(page, "Rows", Curve)
    assert load.lines[1].y == found.series.computed_load.mean and load.y_from == 1
    assert load.lines[0].upper is None and not load.band  # nine steps: nothing is thinned
    (steps,), (bars,) = parts(page, "Bytes", Curve), parts(page, "Bytes", Bars)
    assert [1e6 * y for y in steps.lines[0].y] == pytest.approx(found.series.busiest_rank_bytes.max)
    assert bars.groups == ["1", "2", "3"] and [bar.name for bar in bars.bars] == ["tokens", "gather", "two_level"]
    for bar in bars.bars:
        for i, part in enumerate(found.by_k):
            sent = part.bytes[bar.name]
            assert [1e6 * stack[i] for stack in bar.parts] == pytest.approx([sent.inside.mean, sent.between.mean])
            assert 1e6 * bar.mark[i] == sent.rank.max
    _, alone = page_of(Placement(8, 4, 8))
    (bars,) = parts(alone, "Bytes", Bars)
    assert bars.stack == ["mean"] and len(bars.bars[0].parts) == 1  # one node: nothing between


def test_a_thinned_series_has_bands():
    config, corpus, routers = make(train=TrainConfig(steps=1100, name="long"))
    found = certify(Layout(config, PLACE), corpus.ids, routers)
    (load,) = parts(certificate_page(found, Layout(config, PLACE), corpus), "Rows", Curve)
    assert load.band and len(load.lines[0].x) == 500
    assert load.lines[2].upper == found.series.expert_load.max != load.lines[2].y


def test_one_k_has_no_sum_over_all():
    _, page = page_of(schedule=ScheduleConfig(k_max=2))
    table, _ = parts(page, "Rows", Table)
    assert [row[1] for row in table.rows] == ["2", "2", "2"]


def test_of_a_rank_that_is_alone_nothing_is_said_that_says_nothing():
    """It sends nothing and computes as much as all others: neither bytes nor loads of ranks have a figure or chart."""
    found, page = page_of(Placement(8, 1, 8))
    assert all(part.bytes["tokens"].total == 0 for part in found.by_k)
    assert all(part.computed_rows.max == part.computed_rows.mean for part in found.by_k)
    assert [figure.label for figure in page.figures] == ["Rows of the busiest expert", "Steps with an idle expert"]
    assert page.figures[0].value == str(found.whole.expert_rows.max)
    assert [section.title for section in page.sections] == ["The run", "Rows", "Fixed shapes"]
    (load,) = parts(page, "Rows", Curve)
    assert [line.name for line in load.lines] == ["busiest expert"]
    table, idle = parts(page, "Rows", Table)
    assert {row[0] for row in table.rows if row} == {"of an expert"} and len(idle.rows) == 1
    assert html(page)


def test_every_step_or_a_sample_is_exact():
    assert (counts_verdict(page_of()[0]).value, counts_verdict(page_of()[0]).good) == ("yes", True)
    sampled = counts_verdict(page_of(sample=4)[0])
    assert (sampled.value, sampled.note, sampled.good) == ("1 step in 4", "3 of 9 were counted", None)


def test_a_sample_says_so():
    _, page = page_of(sample=4)
    assert "3 of the first 9 steps, one in 4" in page.lead
    assert "Counted:" not in page_of()[1].lead


def test_what_the_run_is_and_where_it_is_from():
    _, page = page_of()
    (facts,) = parts(page, "The run", Table)
    found = dict(facts.rows)
    assert page.title == "Certificate of tried"
    assert found["ranks"] == "8, 2 on a node, in 2 expert groups of 4, each on 2 nodes"
    assert found["experts"] == "8, 2 on a rank; active for a token: k from 1 to 3, linear"
    assert found["a rank's share"] == "12 tokens in a micro-batch, 1 micro-batch in a step; 2 layers"
    assert found["text"].startswith("<script>alert(1)</script> (file): 488 symbols to train on, sha256 abababab")


def test_hostile_names_and_further_sections_arrive_as_text():
    _, page = page_of(further=[Section("Memory", ["what others <count>"])])
    assert [section.title for section in page.sections] == ["The run", "Rows", "Bytes", "Fixed shapes", "Memory"]
    source = html(page).rpartition("</main>")[0]
    assert "<script>" not in source and "&lt;script&gt;alert(1)" in source
    assert "what others &lt;count&gt;" in source and source.count("<figure") == 3
    text, _ = markdown(page)
    assert "what others \\<count\\>" in text and "\\<script\\>alert(1)" in text


def test_a_terminal_gets_what_a_person_must_know():
    _, page = page_of(further=[Section("Memory", ["not in the terminal"])])
    file = io.StringIO()
    print_top(page, file, 100)
    lines = file.getvalue().splitlines()
    assert len(lines) <= 12 and max(map(len, lines)) <= 100 and lines[0] == "Certificate of tried"
    assert "not in the terminal" not in file.getvalue()
    for figure in page.figures:
        assert any(line.startswith(figure.label) and f"  {figure.value} " in line for line in lines)


def test_rows_of_n_gram_tables_have_a_section():
    tables = NgramTablesConfig(rows=30, orders=[2], heads=2, width=3, layers=[1])
    config, corpus, routers = make(ngram_tables=tables)
    layout, kept = Layout(config, PLACE), []
    found = certify(
        layout,
        corpus.ids,
        routers,
        table_keys=table_keys(tables, SYMBOLS, config.train.seed),
        also=lambda counts, rows: kept.extend([rows] * counts.times),
    )
    rows, sent = parts(certificate_page(found, layout, corpus), "N-gram tables", Table)
    landed = sorted(np.stack([counts.landed_tP for counts in kept]).ravel().tolist())
    (line,) = rows.rows
    assert line[:3] == ["layer 1", "60", "2"] and line[5] == f"{landed[-1]:,}"
    assert line[3] == f"{sum(landed) / len(landed):,.0f}"
    leaves = [counts.link_bytes_PP(12).sum(axis=1) for counts in kept]
    assert sent.rows[0][:2] == ["leaves a rank", f"{np.mean(leaves) / 1e6:,.3f}"]
    # without tables there is none
    _, plain = page_of()
    assert "N-gram tables" not in [section.title for section in plain.sections]


def test_a_dense_run_has_its_rows_of_n_gram_tables_alone():
    tables = NgramTablesConfig(rows=30, orders=[2], heads=2, width=3)
    config, corpus, _ = make(moe=MoEConfig(router="dense"), ngram_tables=tables)
    layout, keys = Layout(config, PLACE), table_keys(tables, SYMBOLS, config.train.seed)
    found = certify(layout, corpus.ids, [], table_keys=keys)
    page = certificate_page(found, layout, corpus)
    assert [section.title for section in page.sections] == ["The run", "N-gram tables"]
    assert [figure.label for figure in page.figures] == [
        "Rows a rank reads",
        "Bytes a rank sends",
        "Bytes between nodes",
    ]
    # the tables' rows do not depend on experts
    with_experts, _, routers = make(ngram_tables=tables)
    beside = certify(Layout(with_experts, PLACE), corpus.ids, routers, table_keys=keys)
    assert found.tables == beside.tables and found.layers == 0 < beside.layers
    assert html(page) and markdown(page)
