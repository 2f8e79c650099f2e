"""Weighted k-NN in PyTorch as code of 2021 computes it.

For each k it makes a pass over all similarities, in a hundred chunks of queries, and votes through
a one-hot tensor of queries, neighbours and classes.

Dims: N bank images, Q queries, D width, C classes, q queries per chunk.
"""

import torch

CHUNKS = 100


@torch.no_grad()
def knn_accuracy(
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    queries: torch.Tensor,
    query_labels: torch.Tensor,
    *,
    k: int,
    temperature: float,
    num_classes: int,
) -> tuple[float, float]:
    """Top-1 and top-5 in percent.

    Args:
      bank: [D, N], unit columns.
      bank_labels: [N] int64.
      queries: [Q, D], unit rows.
      query_labels: [Q] int64.
      k: neighbours.
      temperature: of the votes.
      num_classes: C.
    """
    chunk = max(1, len(queries) // CHUNKS)
    one_hot = torch.zeros(k, num_classes, device=bank.device)
    top1 = top5 = 0
    for start in range(0, len(queries), chunk):
        part, targets = queries[start : start + chunk], query_labels[start : start + chunk]
        similarities, neighbours = torch.mm(part, bank).topk(k, largest=True, sorted=True)  # [q, k]
        candidates = bank_labels.view(1, -1).expand(len(part), -1)
        retrieved = torch.gather(candidates, 1, neighbours)
        one_hot.resize_(len(part) * k, num_classes).zero_()
        one_hot.scatter_(1, retrieved.view(-1, 1), 1)
        weights = similarities.div(temperature).exp()
        votes = (one_hot.view(len(part), -1, num_classes) * weights.view(len(part), -1, 1)).sum(1)
        ranked = votes.sort(1, descending=True).indices  # [q, C]
        right = ranked == targets.view(-1, 1)
        top1 += int(right[:, :1].sum())
        top5 += int(right[:, : min(5, k)].sum())
    return 100 * top1 / len(queries), 100 * top5 / len(queries)
