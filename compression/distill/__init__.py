"""Distillation: one elastic student for all sizes, and the recovery of single candidates."""

from paretune.compression.distill.elastic import ElasticRecipe, ElasticTrainer, elastic_key
from paretune.compression.distill.recover import RecoveryRecipe, recover

__all__ = ["ElasticRecipe", "ElasticTrainer", "RecoveryRecipe", "elastic_key", "recover"]
