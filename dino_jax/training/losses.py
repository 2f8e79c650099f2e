"""The DINO loss and center (Caron et al., 2021, section 3.1).

Dims: B images, V views of which the first two are the global crops, K prototypes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LossOutput(NamedTuple):
    """Loss and statistics of one batch; all but `teacher_mean` are scalars in nats."""

    loss: jax.Array
    teacher_entropy: jax.Array  # mean entropy of the teacher's distributions
    kl: jax.Array  # mean KL(teacher || student) over the pairs of the loss
    teacher_mean: jax.Array  # [K], the teacher's mean distribution


def dino_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    center: jax.Array,
    *,
    student_temp: float | jax.Array,
    teacher_temp: float | jax.Array,
) -> LossOutput:
    """Cross-entropy between the teacher's global views and the student's other views (eq. 3).

    With q_i = softmax((t_i - center) / teacher_temp) and s_v the student's logits divided by
    student_temp, it is the mean over all pairs (i, v), v != i, of -<q_i, log_softmax(s_v)>. Since
    q_i sums to one, this equals logsumexp(s_v) - <q_i, s_v>, which needs one logsumexp per view
    instead of one per pair.

    Args:
      student_logits: [B, V, K] float32, V >= 2, global views first.
      teacher_logits: [B, 2, K] float32, before centering and temperature; receives no gradient.
      center: [1, K] float32, before its update with this batch.
      student_temp: the student's temperature, 0.1 in the paper.
      teacher_temp: the teacher's temperature, 0.04 to 0.07 in the paper.
    """
    views = student_logits.shape[1]
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    log_q = jax.nn.log_softmax((teacher_logits - center) / teacher_temp, axis=-1)
    q = jnp.exp(log_q)
    s = student_logits / student_temp
    lse = jax.nn.logsumexp(s, axis=-1)  # [B, V]
    # A global view is paired with the other global view's target, a local view with both targets,
    # which are therefore summed.
    dots = jnp.sum(q[:, ::-1] * s[:, :2], axis=(1, 2))
    dots += jnp.sum(q.sum(1) * s[:, 2:].sum(1), axis=-1)  # [B]
    pairs = 2 * (views - 1)
    loss = jnp.mean(lse[:, :2].sum(1) + 2 * lse[:, 2:].sum(1) - dots) / pairs
    entropy = -jnp.mean(jnp.sum(q * log_q, axis=-1))
    kl = jax.lax.stop_gradient(loss) - entropy  # each q_i is in the same number of pairs
    return LossOutput(loss, entropy, kl, q.mean((0, 1)))


def update_center(
    center: jax.Array, mean_teacher_logits: jax.Array, momentum: float | jax.Array
) -> jax.Array:
    """Moves the center towards the batch mean of the teacher's logits (paper, eq. 4).

    Args:
      center: [1, K] float32, the center used by this step's loss.
      mean_teacher_logits: [K], mean over both global crops and the global batch.
      momentum: share of the old center that is kept, 0.9 in the paper.
    Returns: [1, K] float32, the center for the next step.
    """
    return center * momentum + mean_teacher_logits[None] * (1 - momentum)
