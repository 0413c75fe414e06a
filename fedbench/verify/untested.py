"""Published claims that can't be tested with the models and data at hand, with the reason of each."""

from __future__ import annotations

from fedbench.verify.claims import Claim

_REASONS = {
    "mezo.accuracy": (
        "within 1 % of fine-tuning on 7 of 11 tasks; OPT-13B and RoBERTa-large",
        "OPT-13B and the eleven prompt sets are not here",
    ),
    "fedkseed_pro.accuracy": (
        "about 7.26 % more Rouge-L than practical baselines",
        "needs models of 1 to 3 billion parameters, Natural Instructions and Dolly, and generation scored by Rouge-L",
    ),
    "fwdllm.convergence": (
        "up to three orders of magnitude faster convergence than backpropagation on phones",
        "rests on wall times of phones, their NPUs and links, with models up to LLaMA-7B",
    ),
    "decomfl.rate": (
        "a rate of convergence that does not depend on the number of parameters under low effective rank",
        "a theorem on a rate: needs a family of models of the same effective rank and many sizes",
    ),
    "baffle.accuracy": (
        "acceptable accuracy from a few scalars a round on MNIST, CIFAR-10/100 and OfficeHome",
        "image models and image data are not here",
    ),
    "spry.memory": (
        "1.4 to 7.1 times less memory than backpropagation; LLaMA2-7B 33.9 to 6.2 GB",
        "needs LLaMA2-7B and OPT-6.7B/13B, which are not here",
    ),
    "spry.accuracy": (
        "5.2 to 13.5 % more accuracy than zeroth-order methods, 1.2 to 20.3 times faster",
        "needs RoBERTa-large to OPT-13B with LoRA on data sets that are not here",
    ),
    "ferret.traffic": (
        "about a million times less communication than FedAvg and 20 times fewer rounds than zeroth-order methods",
        "needs LLaMA models from 1 billion parameters on, Natural Instructions and Dolly, scored by Rouge-L",
    ),
    "meerkat.accuracy": (
        "above full-parameter zeroth-order and other sparse masks at equal synchronisation",
        "needs models of 1 to 2.6 billion parameters; step sizes, epsilon and thresholds were not published",
    ),
    "agzo.accuracy": (
        "above MeZO and LOZO at the same peak memory",
        "needs Qwen3 and Pangu-1B; rank and iterations were not published, and the paper is not federated",
    ),
}

CLAIMS = tuple(Claim(name, published, why=why) for name, (published, why) in _REASONS.items())
