"""The methods of `genkit finetune`. A new one is one file, and one line in this dict."""

from __future__ import annotations

from collections.abc import Mapping

from genkit.rl.finetune.ddpo import DDPO
from genkit.rl.finetune.direct import Direct
from genkit.rl.finetune.dpo import DPO
from genkit.rl.finetune.dppo import DPPO
from genkit.rl.finetune.mixed import Mixed
from genkit.rl.finetune.nft import NFT
from genkit.rl.finetune.reward_method import RewardMethod
from genkit.rl.finetune.rwr import RWR

METHODS: Mapping[str, type[RewardMethod]] = {
    "dppo": DPPO,
    "ddpo": DDPO,
    "mixed": Mixed,
    "rwr": RWR,
    "nft": NFT,
    "dpo": DPO,
    "direct": Direct,
}
