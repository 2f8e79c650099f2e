"""The loss, compared with its definition as a NumPy loop over pairs of views."""

import jax
import numpy as np
import pytest

from dino_jax.training.losses import LossOutput, dino_loss

B, K = 4, 7
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04


def random_logits(views: int, scale: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Student [B, V, K], teacher [B, 2, K] and center [1, K]."""
    rng = np.random.default_rng(views)
    return (
        scale * rng.standard_normal((B, views, K)),
        scale * rng.standard_normal((B, 2, K)),
        scale * rng.standard_normal((1, K)),
    )


@jax.jit
def loss_of(student: jax.Array, teacher: jax.Array, center: jax.Array) -> LossOutput:
    temperatures = {"student_temp": STUDENT_TEMP, "teacher_temp": TEACHER_TEMP}
    return dino_loss(student, teacher, center, **temperatures)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def definition(student: np.ndarray, teacher: np.ndarray, center: np.ndarray) -> dict[str, float]:
    """Loss, KL divergence and entropy as means over the pairs, one pair at a time."""
    losses, kls, entropies = [], [], []
    for i in range(2):
        log_q = log_softmax((teacher[:, i] - center) / TEACHER_TEMP)
        q = np.exp(log_q)
        entropies.append(-(q * log_q).sum(-1).mean())
        for v in range(student.shape[1]):
            if v == i:
                continue
            log_p = log_softmax(student[:, v] / STUDENT_TEMP)
            losses.append(-(q * log_p).sum(-1).mean())
            kls.append((q * (log_q - log_p)).sum(-1).mean())
    return {"loss": np.mean(losses), "kl": np.mean(kls), "teacher_entropy": np.mean(entropies)}


@pytest.mark.parametrize("views", [2, 3, 10])
def test_loss_equals_the_definition(views: int) -> None:
    logits = random_logits(views)
    with jax.enable_x64(True):
        output = loss_of(*logits)
    for name, expected in definition(*logits).items():
        np.testing.assert_allclose(getattr(output, name), expected, rtol=1e-12, err_msg=name)
    q = np.exp(log_softmax((logits[1] - logits[2]) / TEACHER_TEMP))
    np.testing.assert_allclose(output.teacher_mean, q.mean((0, 1)), rtol=1e-12)


def test_loss_in_float32_has_the_precision_of_float32() -> None:
    logits = [x.astype(np.float32) for x in random_logits(10, scale=1.0)]
    output, expected = loss_of(*logits), definition(*[x.astype(np.float64) for x in logits])
    np.testing.assert_allclose(output.loss, expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(output.kl, expected["kl"], rtol=1e-5)


def test_no_view_is_paired_with_itself() -> None:
    student, teacher, center = random_logits(2)
    loss = loss_of(student, teacher, center).loss
    # With two crops, each crop's student is paired with the other crop's teacher.
    swapped = loss_of(student[:, ::-1], teacher[:, ::-1], center).loss
    np.testing.assert_allclose(swapped, loss, rtol=1e-6)
    assert abs(loss_of(student[:, ::-1], teacher, center).loss - loss) > 1e-3


@pytest.mark.parametrize("scale", [10.0, 1e4])
def test_large_logits_stay_finite(scale: float) -> None:
    rng = np.random.default_rng(0)
    student, teacher = np.zeros((B, 3, K)), np.zeros((B, 2, K))
    student[..., 0] = teacher[..., 0] = scale
    teacher[..., 1:] = rng.standard_normal((B, 2, K - 1))
    output = loss_of(student, teacher, np.zeros((1, K)))
    for name, value in output._asdict().items():
        assert np.isfinite(value).all(), name
    np.testing.assert_allclose(output.loss, 0, atol=1e-6)  # both choose prototype 0
    np.testing.assert_allclose(output.teacher_entropy, 0, atol=1e-6)
    opposed = loss_of(-student, teacher, np.zeros((1, K)))
    expected = scale / STUDENT_TEMP + np.log(K - 1)  # the student is uniform over all others
    np.testing.assert_allclose(opposed.loss, expected, rtol=1e-6)


def test_uniform_logits_give_ln_k() -> None:
    output = loss_of(np.ones((B, 4, K)), np.full((B, 2, K), 5.0), np.zeros((1, K)))
    np.testing.assert_allclose(output.loss, np.log(K), rtol=1e-6)
    np.testing.assert_allclose(output.teacher_entropy, np.log(K), rtol=1e-6)
    np.testing.assert_allclose(output.kl, 0, atol=1e-6)
    np.testing.assert_allclose(output.teacher_mean, np.full(K, 1 / K), rtol=1e-6)


def test_gradients_reach_only_the_student() -> None:
    student, teacher, center = random_logits(4)

    def loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
        return loss_of(student, teacher, center).loss

    with jax.enable_x64(True):
        to_student, to_teacher = jax.grad(loss, argnums=(0, 1))(student, teacher)
    assert not to_teacher.any()
    # d loss / d s_v = sum over its pairs of (p_v - q_i) / (temperature * pairs * batch).
    q = np.exp(log_softmax((teacher - center) / TEACHER_TEMP))
    p = np.exp(log_softmax(student / STUDENT_TEMP))
    expected = np.zeros_like(student)
    for i in range(2):
        for v in range(4):
            if v != i:
                expected[:, v] += (p[:, v] - q[:, i]) / (STUDENT_TEMP * 6 * B)
    np.testing.assert_allclose(to_student, expected, atol=1e-13)
