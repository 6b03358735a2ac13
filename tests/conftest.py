"""Every test runs on 8 simulated CPU devices, and a silent rank promotion is an error."""

import gc
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()

import jax
import pytest

from tests import compiling

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """What one test compiles, all others of this session have: most of a test is compiling."""
    place = getattr(config, "workerinput", {}).get("programs")
    if place is None:
        temporary = tempfile.TemporaryDirectory(prefix="qkv-jax-programs-")
        config.add_cleanup(temporary.cleanup)
        place = temporary.name
    config.programs = place
    # Of a process that holds so many objects, looking for garbage takes a twentieth of the time.
    gc.set_threshold(50_000, 20, 50)
    # Else every operation of a program names all the frames of pytest: a twentieth of the time.
    jax.config.update("jax_include_full_tracebacks_in_locations", False)
    jax.config.update("jax_compilation_cache_dir", place)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Of pytest-xdist: its processes share the place."""
    node.workerinput["programs"] = node.config.programs


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Programs are compiled as users have them where that is what is tested; else for less time."""
    compiling.choose(quick=not _is_of(item, AS_USERS_HAVE_THEM))


def _is_of(item, kinds):
    return any(all(part in item.nodeid for part in parts) for parts in kinds)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Programs are let go between files, before the memory maps that hold them run out."""
    maps = Path("/proc/self/maps")
    if nextitem is None or nextitem.path == item.path or not maps.is_file():
        return
    if maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What takes long, and of which shorter tests hold most, is left to `make test-slow`."""
    for item in items:
        if _is_of(item, SLOW):
            item.add_marker(pytest.mark.slow)


# Linux allows a process 65,530 (vm.max_map_count) and XLA aborts without one; a hundred tests take 5,000.
MOST_MAPS = 20_000
SLOW = [
    ("cli/test_commands.py", "test_a_run_lies_in_runs"),
    ("decoding/test_invariance.py", "test_a_sentence_is_the_same", "[phrases]"),
    ("decoding/test_invariance.py", "test_a_sentence_is_the_same", "[sample]"),
    ("decoding/test_phrases.py", "test_every_hypothesis_holds", "-4]"),
    ("interop/test_export.py", "the_same_model[mbart]"),
    ("interop/test_export.py", "the_same_model[pegasus]"),
    ("layers/test_recurrent.py", "[concat]"),
    ("models/test_recurrent.py", "[concat]"),
    ("models/test_recurrent.py", "[dot]"),
    ("models/test_resnet.py", "test_a_mesh_learns"),
    ("models/test_seq2seq.py", "test_data_parallel"),
    ("models/test_seq2seq.py", "test_packed_pairs_are_computed", "[post]"),
    ("models/test_seq2seq_layers.py", "test_a_loop_over_shards"),
    ("models/test_seq2seq_layers.py", "are_the_same[scan]"),
    ("models/test_seq2seq_layers.py", "are_the_same[everything]"),
    ("ops/test_attention.py", "gradients_equal_the_oracle", "-float32-blockwise]"),
    ("ops/test_context_parallel.py", "equal_the_oracle[dense-", "-ring]"),
    ("ops/test_context_parallel.py", "equal_the_oracle[dense-", "-ulysses]"),
    ("ops/test_context_parallel.py", "equal_the_oracle[blocks-", "-gather]"),
    ("ops/test_context_parallel.py", "on_any_number_of_devices", "-4]"),
    ("ops/test_context_parallel.py", "on_any_number_of_devices[dense-2]"),
    ("ops/test_context_parallel.py", "test_any_rule_", "Auto-True"),
    ("ops/test_context_parallel.py", "test_any_rule_", "[dense-", "-ring]"),
    ("ops/test_context_parallel.py", "test_any_rule_", "[dense-", "-ulysses]"),
    ("ops/test_context_parallel.py", "test_any_rule_", "Explicit-True-zigzag]"),
    ("ops/test_context_parallel.py", "test_any_rule_", "Explicit-True-gather]"),
    ("ops/test_context_parallel.py", "test_any_rule_", "[dense-", "Explicit"),
    ("ops/test_context_parallel.py", "test_any_rule_", "Explicit-False"),
    ("ops/test_context_parallel.py", "test_patterns_keep_their_meaning[blocks]"),
    ("ops/test_context_parallel.py", "shard_map_of_the_user[dense-False-"),
    ("ops/test_derivatives.py", "test_shared_out_over_devices", "[False-"),
    ("ops/test_derivatives.py", "test_each_rule_", "[forward over reverse-"),
    ("ops/test_derivatives.py", "test_third_order_is_refused"),
    ("peers/test_decoding.py", "test_rules_find_the_same[m2m"),
    ("peers/test_decoding.py", "test_rules_find_the_same[t5-gated"),
    ("peers/test_export.py", "test_trained_models", "pegasus"),
    ("peers/test_export.py", "test_trained_models", "-target]"),
    ("peers/test_pretrained.py", "test_cached_steps", "[marian-separate]"),
    ("peers/test_pretrained.py", "test_cached_steps", "[mbart]"),
    ("peers/test_tokamax.py", "test_mask0"),
    ("peers/test_tokamax.py", "test_mask4"),
    ("peers/test_tokamax.py", "test_multiple_batch_dims"),
    ("tasks/test_detection.py", "on_eight[qkv_jax.models.set_prediction]"),
    ("tasks/test_image_text.py", "test_updates_are_alike"),
    ("tasks/test_recommendation.py", "test_sasrec_trains"),
    ("tasks/test_speech.py", "test_eight_devices"),
    ("tasks/test_text.py", "[bert]"),
    ("tasks/test_text.py", "[windowed]"),
    ("test_experiments.py", "test_it_trains_two_steps_shrunk[bahdanau]"),
    ("test_experiments.py", "test_it_trains_two_steps_shrunk[home_assistant]"),
    ("test_experiments.py", "test_it_trains_two_steps_shrunk[interface]"),
    ("test_experiments.py", "test_it_trains_two_steps_shrunk[iwslt14]"),
    ("test_experiments.py", "test_it_trains_two_steps_shrunk[multi30k]"),
    ("test_experiments.py", "test_it_trains_two_steps_shrunk[multi30k_multilingual]"),
    ("test_experiments.py", "test_it_trains_two_steps_shrunk[multi30k_raw]"),
    ("test_experiments.py", "test_it_trains_two_steps_shrunk[tatoeba]"),
    ("test_experiments.py", "test_it_trains_two_steps_shrunk[wmt14]"),
    ("test_experiments.py", "test_the_lesson_runs_as_a_script"),
    ("training/test_precision.py", "test_a_resumed_run", "[kahan]"),
    ("translation/test_compress.py", "test_a_pruned_model_is_trained_on"),
    ("translation/test_compress.py", "test_a_quantised_model_is_exported_and"),
    ("translation/test_compress.py", "test_a_run_that_is_trained_to_be_rounded"),
    ("translation/test_distillation.py", "test_a_mesh_shares_out_teacher"),
    ("translation/test_distributed.py", "test_two_processes_go_on"),
    ("translation/test_exchange.py", "keeps_its_tokeniser[run]"),
    ("translation/test_exchange.py", "keeps_its_bits[lora]"),
    ("translation/test_exchange.py", "test_a_resumed_run_starts"),
    ("translation/test_exchange.py", "test_the_padding_of_a_model"),
    ("translation/test_mesh.py", "test_a_mesh_of_explicit_axes"),
    ("translation/test_mesh.py", "test_lengths_are_shared_out_by_config_alone[zigzag]"),
    ("translation/test_mesh.py", "[2x2x2]"),
    ("translation/test_mesh.py", "equals_one_device[context]"),
    ("translation/test_mesh.py", "equals_one_device[tensor]"),
    ("translation/test_sparse.py", "test_heads_that_training_closes"),
    ("translation/test_sparse.py", "test_a_ticket_has_early_weights", "[2]"),
    ("translation/test_plan.py", "test_devices_that_share_out_the_model"),
    ("translation/test_plan.py", "test_plan_prints_tables"),
]
AS_USERS_HAVE_THEM = [
    ("ops/test_attention.py", "equal_the_oracle", "bfloat16"),
    ("ops/test_attention.py", "equal_the_oracle[NaN", "float32"),
    ("ops/test_attention.py", "equal_the_oracle[a score of -inf", "float32"),
    ("ops/test_attention.py", "equal_the_oracle[plain", "float32"),
    ("ops/test_attention.py", "equal_the_oracle[scores of hundreds", "float32"),
    ("ops/test_attention.py", "equal_the_oracle[soft cap", "float32"),
    ("ops/test_attention.py", "test_gradients_are_the_same_through_remat"),
    ("ops/test_context_parallel.py", "test_neither_keys_nor_scores"),
    # By the older emitters tokamax gives a bias infinite slopes.
    ("peers/test_kernels.py",),
    ("training/test_step.py", "test_accumulation"),
    ("training/test_step.py", "test_all_devices"),
    ("translation/test_mesh.py", "test_training_equals", "[2x2x2"),
    ("translation/test_plan.py",),
]
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of corpora beside the checkout; a test that needs it skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the corpora in {SHARED}")
    return SHARED
