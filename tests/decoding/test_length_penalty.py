import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.decoding import gnmt, power


def test_power_divides_by_a_power_of_the_length():
    np.testing.assert_allclose(
        power(0.5)(jnp.array([1, 4, 9])), [1.0, 2.0, 3.0], rtol=1e-6
    )
    np.testing.assert_allclose(power(-1.0)(jnp.array([1, 4])), [1.0, 0.25], rtol=1e-6)


def test_gnmt_is_equation_14_of_wu_et_al():
    lengths = jnp.array([1, 7, 13])
    np.testing.assert_allclose(gnmt(1.0)(lengths), [1.0, 2.0, 3.0], rtol=1e-6)
    np.testing.assert_allclose(gnmt(0.5)(lengths), np.sqrt([1.0, 2.0, 3.0]), rtol=1e-6)


@pytest.mark.parametrize("family", [power, gnmt])
def test_alpha_zero_changes_nothing(family):
    np.testing.assert_array_equal(family(0.0)(jnp.arange(1, 5)), np.ones(4))


def test_penalties_are_values():
    assert power(0.6) == power(0.6) != gnmt(0.6)
    assert hash(power(0.6)) == hash(power(0.6))


def test_alpha_must_be_finite():
    with pytest.raises(ValueError, match="alpha"):
        power(float("nan"))
