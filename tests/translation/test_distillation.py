"""A student that learns from a teacher's predictions, word by word."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from qkv_jax import training
from qkv_jax.models import seq2seq
from qkv_jax.training import MeshConfig, OptimizerConfig, Outcome, RunError, make_mesh
from qkv_jax.translation import DistillationConfig, load_run, read_run
from qkv_jax.translation.loss import make_loss
from qkv_jax.translation.models import init_params, model_graph, new_model
from qkv_jax.translation.plan import plan_run
from qkv_jax.translation.run import prepare
from qkv_jax.translation.teacher import Teacher, load_teacher, make_teacher
from tests.translation import toy
from tests.translation.test_loss import batch

SIZES = {"encoder_layers": 1, "decoder_layers": 1, "vocabulary": 24, "norm": "pre"}
TEACHER = seq2seq.Config(d_model=24, d_ff=32, heads=2, dropout=0.5, **SIZES)
STUDENT = seq2seq.Config(d_model=16, d_ff=24, heads=2, dropout=0.0, **SIZES)


def teacher(weight=0.5, temperature=1.0, params=None):
    if params is None:
        params = jax.tree.map(lambda x: 2 * x, init_params(TEACHER, seed=1))
    return Teacher(TEACHER, params, weight, temperature)


def of_logits(model, rows):
    """float64 logits of a row for each pair, without packing."""
    shifted = np.pad(rows["target"][:, :-1], ((0, 0), (1, 0)), constant_values=1)
    return np.asarray(jax.jit(model)(rows["source"], shifted), np.float64)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize(("w", "heat"), [(0.25, 1.0), (0.25, 3.0), (1.0, 3.0)])
def test_the_loss_is_the_labels_and_the_softened_divergence_of_real_tokens(w, heat):
    rows = {name: batch()[name] for name in ("source", "target")}
    params = init_params(STUDENT, seed=0)
    loss = make_loss(STUDENT, 0.0, teacher=teacher(w, heat))
    sums = jax.jit(loss)(params, rows, jax.random.key(0))[1]
    theirs = nnx.merge(model_graph(TEACHER), teacher().params)
    student, told = (of_logits(m, rows) for m in (new_model(STUDENT, seed=0), theirs))
    real = rows["target"] != 0
    picked = np.take_along_axis(log_softmax(student), rows["target"][..., None], -1)
    log_p, log_q = log_softmax(told / heat), log_softmax(student / heat)
    apart = heat**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)
    wanted = ((1 - w) * -picked[..., 0] + w * apart)[real].sum()
    assert apart[real].sum() > 1.0
    np.testing.assert_allclose(sums["loss_sum"], wanted, rtol=1e-5)
    np.testing.assert_allclose(sums["nll_sum"], -picked[real].sum(), rtol=1e-5)


def update(*, devices, accumulate):
    """Metrics, parameters and the teacher after two updates with R-Drop, of packed rows."""
    config = dataclasses.replace(STUDENT, dropout=0.2)
    mesh = make_mesh(MeshConfig(data=devices // 2 or 1, fsdp=min(devices, 2)))
    optimizer = training.make_optimizer(
        OptimizerConfig(peak_lr=0.1, warmup_steps=1, eps=1e-3), 10
    )
    state = training.create_state(
        lambda: init_params(config, seed=0), optimizer, seed=0, mesh=mesh
    )
    tutor = teacher(0.5, 2.0, training.place_state(teacher().params, mesh))
    loss = make_loss(config, 0.1, r_drop=1.0, teacher=tutor)
    step = training.make_train_step(loss, optimizer, mesh=mesh, accumulate=accumulate)
    for _ in range(2):
        state, metrics = step(state, training.place_batch(batch(), mesh))
    return jax.tree.map(np.asarray, (metrics, state.params, tutor.params)), tutor


def test_a_mesh_shares_out_teacher_and_microbatches_and_computes_the_same():
    (one, _), (eight, tutor) = (update(devices=n, accumulate=2) for n in (1, 8))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5),
        one[:2],
        eight[:2],
    )
    jax.tree.map(np.testing.assert_array_equal, eight[2], teacher().params)
    kernel = tutor.params["encoder"][0]["feed_forward"]["up"]["kernel"]
    shape = jax.tree.leaves(kernel)[0].sharding.shard_shape((24, 32))
    assert shape == (12, 32)


def test_the_teacher_is_an_argument_of_the_program_and_evaluation_does_without():
    params, rng = init_params(STUDENT, seed=0), jax.random.key(0)

    def program(rng, teacher):
        loss = make_loss(STUDENT, 0.1, teacher=teacher)
        held = loss if teacher is not None else Partial(loss)
        return jax.make_jaxpr(lambda f, *x: f(*x, rng))(held, params, batch())

    plain, taught = program(rng, None), program(rng, teacher())
    more = len(taught.jaxpr.invars) - len(plain.jaxpr.invars)
    assert more == len(jax.tree.leaves(teacher().params))
    assert sum(map(np.size, taught.consts)) < 100
    assert len(taught.jaxpr.eqns) > 1.3 * len(plain.jaxpr.eqns)
    without = program(None, teacher()).jaxpr
    assert len(without.eqns) == len(program(None, None).jaxpr.eqns)


@pytest.fixture(scope="module")
def taught(finished, corpus, tmp_path_factory):
    """A teacher's directory, and that of a run that learned from it."""
    folder = tmp_path_factory.mktemp("taught")
    shutil.copytree(finished, folder / "teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qkv_jax.translation.run._finish", lambda *_: Outcome())
        toy.run(config_of(corpus, folder))
    return folder


def config_of(corpus, folder, **changes):
    distillation = DistillationConfig(teacher=str(folder / "teacher"), weight=0.7)
    options = {"distillation": distillation, "model": seq2seq.tiny(dropout=0.0)}
    made = toy.make_config(corpus, folder / "student")
    model = dataclasses.replace(made.model, d_model=8, dropout=0.2)
    return dataclasses.replace(made, **(options | {"model": model} | changes))


def test_the_student_takes_the_tokeniser_and_keeps_none_of_the_weights(
    finished, taught
):
    student = load_run(taught / "student")
    assert student.tokenizer.digest == load_run(finished).tokenizer.digest
    assert student.config.d_model == 8
    assert read_run(taught / "student").distillation.weight == 0.7
    own, theirs = (
        {x.name for x in (run / "checkpoints" / "4").iterdir()}
        for run in (taught / "student", finished)
    )
    assert own == theirs


def test_a_run_that_goes_on_ends_with_the_same_bits_and_needs_the_same_teacher(
    taught, corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr("qkv_jax.translation.run._finish", lambda *_: Outcome())
    straight = load_run(taught / "student").params
    again = tmp_path / "again"
    shutil.copytree(taught / "student", again)
    shutil.rmtree(again / "checkpoints" / "4")
    (again / "result.json").unlink()
    config = config_of(corpus, taught)
    config = dataclasses.replace(
        config, run=dataclasses.replace(config.run, directory=again)
    )
    place, away = taught / "teacher", taught / "away"
    place.rename(away)
    with pytest.raises(RunError, match="distillation.teacher, which the run needs"):
        toy.run(config)
    shutil.copytree(away, place)
    (place / "checkpoints" / "4").rename(place / "checkpoints" / "gone")
    with pytest.raises(RunError, match="another configuration .*teacher"):
        toy.run(config)
    shutil.rmtree(place)
    away.rename(place)
    toy.run(config)
    jax.tree.map(np.testing.assert_array_equal, load_run(again).params, straight)


def test_a_teacher_that_predicts_something_else_is_refused(taught, corpus, monkeypatch):
    config = config_of(corpus, taught, init_from="another")
    start = load_teacher(config)
    text = dataclasses.replace(config.text, vocabulary=285)
    other = prepare(dataclasses.replace(config, text=text)).tokenizer
    short = {"positions": "learned", "max_positions": 8}

    def made(tokenizer=start.tokenizer, told=None, **model):
        student = dataclasses.replace(start.model, **model)
        told = start._replace(model=dataclasses.replace(start.model, **(told or {})))
        options = {"model": student, "tokenizer": tokenizer, "mesh": make_mesh()}
        return make_teacher(config, told, **options)

    assert made().weight == 0.7
    with pytest.raises(RunError, match="another tokeniser than another.*qkv-jax disti"):
        made(tokenizer=other)
    with pytest.raises(RunError, match="scores 280 tokens, and the student 288"):
        made(vocabulary=288)
    with pytest.raises(RunError, match="knows 8 positions: text.max_source and"):
        made(told=short)
    published = start._replace(tokenizer=object())
    monkeypatch.setattr(
        "qkv_jax.translation.teacher.load_start", lambda *_, **__: published
    )
    with pytest.raises(RunError, match="published tokeniser, which new weights cannot"):
        load_teacher(dataclasses.replace(config, init_from=None))


def test_a_plan_counts_the_teachers_weights_and_forward_pass(taught, corpus):
    config = config_of(corpus, taught)
    plan, tutor = plan_run(config), load_teacher(config)
    assert plan.held["teacher"] == sum(x.nbytes for x in jax.tree.leaves(tutor.params))
    model = dataclasses.replace(config.model, vocabulary=tutor.model.vocabulary)
    rows = plan.tokens // config.text.max_target
    sizes = {"source": config.text.max_source, "target": config.text.max_target}
    own, theirs = (
        seq2seq.train_flops(m, rows=rows, **sizes) for m in (model, tutor.model)
    )
    assert plan.flops == own + theirs / 3
    assert plan.bytes == sum(plan.held.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0.0, "teacher": "x"}, r"weight must be in \(0, 1\]; got 0.0"),
        ({"temperature": 0.0, "teacher": "x"}, "temperature must be positive"),
        ({"weight": 0.4}, "are of a teacher: give distillation.teacher"),
        ({"temperature": 2.0}, "are of a teacher: give distillation.teacher"),
    ],
)
def test_misuse_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**options)
