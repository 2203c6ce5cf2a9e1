"""Distillation: one elastic student for all sizes, and the recovery of single candidates, end to end or block by block."""

from paretune.compression.distill.blockwise import recover_blocks
from paretune.compression.distill.elastic import ElasticRecipe, ElasticTrainer, elastic_key
from paretune.compression.distill.labels import LabelCache
from paretune.compression.distill.recover import RecoveryRecipe, recover

__all__ = [
    "ElasticRecipe",
    "ElasticTrainer",
    "LabelCache",
    "RecoveryRecipe",
    "elastic_key",
    "recover",
    "recover_blocks",
]
