"""`paretune op-profile`: where the time of a model goes, and where compression would pay."""
