"""What is known about the accuracy that a rule costs: measured here, or published. The planner predicts none of it.

Accuracies are in percent; "digits" and "CIFAR-10" are docs/results/digits.md and cifar10.md: small runs in 4 stages, made to
compare methods with each other.
"""

from __future__ import annotations

from typing import NamedTuple


class Accuracy(NamedTuple):
    """exact: whether the updates are those of one device, or could be. short: for a table. sentence, source: in full."""

    exact: bool
    short: str
    sentence: str
    source: str


ACCURACY: dict[str, Accuracy] = {
    "backprop": Accuracy(True, "exact", "Exact: the same updates as one device.", "tests/test_laws.py, bit for bit"),
    "gpipe": Accuracy(
        True,
        "exact",
        "Exact: the same updates as one device that accumulates its micro-batches.",
        "tests/test_laws.py, bit for bit",
    ),
    "1f1b": Accuracy(
        True,
        "exact",
        "Exact: the same updates as one device that accumulates its micro-batches.",
        "tests/test_laws.py, bit for bit",
    ),
    "pipedream": Accuracy(
        False,
        "exact gradients, J−1−j updates old",
        "Every gradient is exact for the weights of its forward, which have been updated since.",
        "tests/test_delayed.py",
    ),
    "pipedream-2bw": Accuracy(
        False,
        "exact gradients, one update old",
        "Every gradient is that of the weights one update before. Published: on a par with data parallelism.",
        "Narayanan et al. 2021; Fournier 2024, §5.4",
    ),
    "cdp-pipeline": Accuracy(
        False,
        "exact gradients, 0 or 1 update old",
        "Every gradient is that of the newest weights or of those one update before. Published: on a par with data "
        "parallelism.",
        "Fournier 2024, §5.4",
    ),
    "delayed-gradients": Accuracy(
        False,
        "approximate gradients, J−1−j updates old",
        "Activations of old weights, today's weights in the backward.",
        "Xu et al. 2020",
    ),
    "ddg": Accuracy(
        False,
        "exact gradients, J−1−j updates old",
        "Published, ResNet-56 on CIFAR-10: error 6.2 with backprop, 6.6, 6.5, 6.6 with 2, 3, 4 stages.",
        "Zhuang et al. 2021 (FDG)",
    ),
    "features-replay": Accuracy(
        False,
        "approximate gradients, J−1−j updates old",
        "Published, ResNet-56 on CIFAR-10: error 6.2 with backprop, 6.1, 6.3, 6.5 with 2, 3, 4 stages.",
        "Zhuang et al. 2021 (FDG)",
    ),
    "fdg": Accuracy(
        False,
        "gradients shrunk with depth",
        "Published, ResNet-56 on CIFAR-10, best shrinking factor: error 6.2 with backprop, 5.9, 5.9, 6.1 with 2, 3, 4 "
        "stages.",
        "Zhuang et al. 2021 (FDG)",
    ),
    "petra": Accuracy(
        False,
        "approximate gradients, 2(J−1−j)/k updates old",
        "Published, RevNet-18, -34, -50 on ImageNet: 71.0, 73.5, 74.8 against 70.8, 73.2, 75.4 with backprop; on "
        "CIFAR-10 94.9, 94.8, 94.5 against 94.9, 95.3, 95.2.",
        "Rivaud et al. 2024",
    ),
    "greedy": Accuracy(
        False,
        "lower, more so with more stages",
        "Digits 99.3 against backprop's 99.9, CIFAR-10 in a short run on a par (42.6 against 42.1). Published, "
        "ResNet-32 on CIFAR-10: error 7.4 with backprop, 10.3, 16.1, 21.2 with 2, 4, 8 stages. It goes through the "
        "data once per stage.",
        "docs/results; Wang et al. 2021 (InfoPro)",
    ),
    "dgl": Accuracy(
        False,
        "lower, more so with more stages",
        "Digits 99.4 against backprop's 99.9, CIFAR-10 in a short run 37.4 against 42.1. Published, ResNet-32 on "
        "CIFAR-10: error 7.4 with backprop, 8.7, 11.5, 14.2 with 2, 4, 8 stages; on ImageNet, VGG-19 top-1 69.7 with "
        "backprop, 70.2 and 69.2 with 2 and 4 stages, ResNet-152 74.4 and 74.5 with 2.",
        "docs/results; Wang et al. 2021 (InfoPro); Belilovsky et al. 2020",
    ),
    "async-dgl": Accuracy(
        False,
        "dgl at equal rates, lower where they differ",
        "With one micro-batch in every buffer and equal rates it is dgl. With turns drawn at random, digits in a short run "
        "77.3 against dgl's 84.4; with one stage four times rarer 71 to 89, with reuse=1 88.5.",
        "docs/results",
    ),
    "predsim": Accuracy(
        False,
        "lower under a head budget",
        "Digits 97.7 against backprop's 99.9, CIFAR-10 in a short run 35.1 against 42.1 (heads of 20 % of a stage). "
        "Published, with heads of full size: VGG8b on CIFAR-10, error 5.6 against 6.0 with backprop.",
        "docs/results; Nøkland & Eidnes 2019",
    ),
    "infopro": Accuracy(
        False,
        "lower, more so with more stages",
        "Published, ResNet-32 on CIFAR-10, error with contrast: 7.8, 8.6, 11.1, 12.8 with 2, 4, 8, 16 stages, against 7.4 with "
        "backprop and 8.7, 11.5, 14.2, 16.2 with dgl.",
        "docs/results/local_learning.md; Wang et al. 2021",
    ),
    "gn-dgl": Accuracy(
        False,
        "lower, more so with more stages",
        "Published, ResNet-32 on CIFAR-10: 91.4, 89.7, 87.9 with 2, 4, 8 modules in 2 groups (K·G), 89.7, 89.3, 88.1 with 4, "
        "8, 16 in 4 groups, against 93.0 with backprop.",
        "docs/results/local_learning.md; Patel 2023, Table 3.4",
    ),
    "simclr": Accuracy(
        False,
        "without labels; read by a probe",
        "Published, ResNet-50, linear probe on CIFAR-10: 92.1 after 1000 epochs.",
        "Fournier 2024, Table 3.2",
    ),
    "dgssl": Accuracy(
        False,
        "lower, more so with more stages",
        "Published, ResNet-50, linear probe on CIFAR-10: 90.0, 87.5, 85.9 with 4, 8, 16 stages against SimCLR's 92.1 "
        "(Fournier); 91.0, 88.8, 87.4 against 92.6 (Patel).",
        "Fournier 2024, Table 3.2; Patel 2023, Table 4.1",
    ),
    "subsampled-simclr": Accuracy(
        False,
        "above dgssl with many stages",
        "Published, ResNet-50, linear probe on CIFAR-10: 89.9, 88.4, 87.1 with 4, 8, 16 stages, against dgssl's 90.0, 87.5, "
        "85.9 and SimCLR's 92.1; 91.4 with one.",
        "Fournier 2024, Table 3.2",
    ),
    "oracle-simclr": Accuracy(
        False,
        "above dgssl with many stages",
        "Published, ResNet-50, linear probe on CIFAR-10: 89.1 with 16 stages, against dgssl's 85.6 and SimCLR's 92.4. It needs "
        "a network trained before.",
        "Fournier 2024, Table 3.1",
    ),
    "dgssl-llm": Accuracy(
        False,
        "above dgssl with many stages",
        "Published, ResNet-50, linear probe on CIFAR-10: 92.0, 90.5, 89.8 with 4, 8, 16 stages, against dgssl's 91.0, 88.8, "
        "87.4 and SimCLR's 92.6. It needs a network trained before, but with thresholds=batch.",
        "Patel 2023, Tables 4.1 and 4.2",
    ),
    "interlocking": Accuracy(
        False,
        "between dgl and backprop",
        "d = 1: digits 99.4 against backprop's 99.9, CIFAR-10 in a short run 38.6, between dgl's 37.4 and backprop's "
        "42.1. Exact from d = J−1 on. Published: better than local, without numbers we could check.",
        "docs/results; Gomez et al. 2022",
    ),
    "forward-gradient": Accuracy(
        False,
        "projected gradients",
        "Learns the projection of a gradient on a guess. Published, ResNet-18 on CIFAR-10 in 8 stages: 92.0 % with a local "
        "guess in weight space (local learning 92.0, end to end 94.5), 67 % with a random head's, far less with noise.",
        "Fournier 2024, Tables 4.2-4.4",
    ),
    "local-forward-gradient": Accuracy(
        False,
        "below dgl, by the variance of random directions",
        "Unbiased for dgl's gradients. Published, on a network made for it (groups, patches, LayerNorm): CIFAR-10, error 30.7 "
        "against 33.6 with backprop; ImageNet 58.4 against 36.8 with backprop and 54.4 with exact local gradients.",
        "Ren et al. 2023",
    ),
    "node-perturbation": Accuracy(
        False,
        "far below backprop in wide networks",
        "Unbiased but for its noise's size; the variance grows with the number of disturbed units. Published, with exact "
        "derivatives along the noise: ImageNet, error 98.8 against 36.8 with backprop.",
        "Ren et al. 2023 (FG-A)",
    ),
    "mezo": Accuracy(
        False,
        "for fine-tuning only",
        "Unbiased but for the displacement; the variance grows with the number of weights. Published as a way to fine-tune "
        "large language models; from random weights, with exact derivatives, CIFAR-10: error 56.0 against 33.6 with backprop.",
        "Malladi et al. 2023; Ren et al. 2023 (FG-W)",
    ),
    "torch-gpipe": Accuracy(
        True,
        "exact",
        "Exact; digits 99.5 against backprop's 99.5, micro-batches with BatchNorm statistics of their own.",
        "docs/results/processes.md",
    ),
    "torch-1f1b": Accuracy(
        True,
        "exact",
        "Exact; digits 99.5 against backprop's 99.5, micro-batches with BatchNorm statistics of their own.",
        "docs/results/processes.md",
    ),
    "independent": Accuracy(
        False,
        "each as one device",
        "Each network is what one device would train; together they are an ensemble, and their average is at chance. "
        "Published, 5 ResNet-18 on CIFAR-100: ensemble 83.7, average 1.0.",
        "Fournier 2024, Table 6.2",
    ),
    "all-reduce": Accuracy(
        True, "exact", "Exact: the gradient of the whole batch.", "tests/test_consensus.py; without BatchNorm"
    ),
    "cdp": Accuracy(
        False,
        "exact gradients, 0 or 1 update old",
        "Every gradient is that of the newest weights or of those one update before. Published, ResNet-18 on CIFAR-10: as "
        "data parallelism or better, v2 above v1.",
        "Fournier 2024, Table 5.2",
    ),
    "acco": Accuracy(
        False,
        "half the gradients at an estimate",
        "Half of every update's samples see the weights, half an estimate of them. Published, GPT of 125M on OpenWebText: "
        "perplexity 24.2 against 24.3 with 8 workers, 22.5 against 21.7 with 32.",
        "Nabli et al. 2024",
    ),
    "dpu": Accuracy(
        False,
        "gradients one update late",
        "Every gradient is applied one update late. Published: worse than data parallelism on TinyStories, also with a "
        "warm-up.",
        "Nabli et al. 2024",
    ),
    "wp": Accuracy(
        False,
        "gradients at a prediction",
        "Every gradient is of predicted weights. Published: worse than data parallelism on TinyStories, also with a warm-up.",
        "Nabli et al. 2024",
    ),
    "torch-zero1": Accuracy(
        True, "exact", "Exact: the updates of all-reduce, bit for bit.", "tests/test_torch_sharding.py"
    ),
    "wash": Accuracy(
        False,
        "the average of N",
        "The result is the average of N networks. Digits 99.6 against backprop's 99.9 (p = 0.01). In short runs p decides: "
        "on CIFAR-10, 5 small VGGs, average 49.0 with p = 0.2 and 47.0 with p = 0.05, independent ones' ensemble 49.6; with "
        "p = 0.01 and fewer updates it is below its members. Published, 5 ResNet-18 on CIFAR-100, 300 epochs: average 82.0, "
        "ensemble of independent ones 83.7.",
        "docs/results; Fournier 2024, Table 6.2",
    ),
    "papa": Accuracy(
        False,
        "the average of N",
        "The result is the average of N networks. Published, 5 ResNet-18 on CIFAR-100: average 82.0, ensemble of "
        "independent ones 83.7; on CIFAR-10 97.3 and 97.3.",
        "Fournier 2024, Table 6.2",
    ),
    "local-sgd": Accuracy(
        False,
        "averaged every H updates",
        "Replicas drift apart for H updates at a time. No number was measured here, and none published was checked.",
        "–",
    ),
    "papa-all": Accuracy(
        False,
        "the average of N",
        "The result is the average of N networks that are merged every few epochs. Published: below PAPA in most settings.",
        "Jolicoeur-Martineau et al. 2023",
    ),
    "papa-2": Accuracy(
        False,
        "the average of N",
        "The result is the average of N networks that are merged in pairs. Published: below PAPA in most settings.",
        "Jolicoeur-Martineau et al. 2023",
    ),
    "btm": Accuracy(
        False,
        "the average of N branches",
        "The result is the average, or the ensemble, of N networks that branch after a common phase. Published: a forest of "
        "language models on par with one trained with 2.5 times the computation; random splits of the data do not work.",
        "Li et al. 2022",
    ),
    "slowmo": Accuracy(
        False,
        "averaged every H updates, slow momentum",
        "Replicas drift apart for H updates at a time. No number was measured here, and none published was checked.",
        "–",
    ),
    "co2": Accuracy(
        False,
        "averages one round late",
        "Averages are taken in one round late, divided by a staleness gap of our own definition. No number was measured "
        "here, and none published was checked.",
        "–",
    ),
    "easgd": Accuracy(
        False,
        "the centre of N",
        "The result is a centre that N networks are tied to. No number was measured here, and none published was checked.",
        "–",
    ),
    "d-psgd": Accuracy(
        False,
        "averages with all neighbours",
        "Replicas average with their neighbours after every update. No number was measured here, and none published was "
        "checked.",
        "–",
    ),
    "sgp": Accuracy(
        False,
        "push-sum averages",
        "Published, ImageNet on 32 x 8 GPUs: top-1 within 1.2 of all-reduce.",
        "Assran et al. 2019",
    ),
    "gossip": Accuracy(
        False,
        "pairwise averages",
        "Replicas average in pairs on a graph. Published for the ring, ImageNet, from memory: 74.8, 71.6, 64.1 with 16, 32, 64 "
        "workers at one exchange per gradient, against 75.5, 75.2, 74.5 of all-reduce.",
        "Nabli et al. 2023",
    ),
    "acid": Accuracy(
        False,
        "pairwise averages, accelerated",
        "Published for the ring, ImageNet, from memory: 74.7, 73.4, 68.0 with 16, 32, 64 workers at one exchange per gradient, "
        "against 74.8, 71.6, 64.1 of plain gossip.",
        "Nabli et al. 2023",
    ),
    "diloco": Accuracy(
        False,
        "averaged every H updates, outer momentum",
        "Published, a language model of 150M on C4: perplexity 15.0 with 8 replicas against 16.2 of one, H = 500.",
        "Douillard et al. 2023",
    ),
    "torch-ddp": Accuracy(
        True, "exact", "Exact up to rounding; digits 98.6, as all-reduce.", "docs/results/processes.md"
    ),
    "torch-fully-shard": Accuracy(
        True, "exact", "Exact up to rounding; digits 98.6, as all-reduce.", "docs/results/processes.md"
    ),
}
UNKNOWN = Accuracy(False, "not known", "Nothing is known here about its accuracy.", "–")


def of(rule: str) -> Accuracy:
    """What is known about the rule of that name."""
    return ACCURACY.get(rule, UNKNOWN)
