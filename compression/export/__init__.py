"""From a student in torch to the folder that ships."""

from paretune.compression.export.artifact import ArtifactFacts, check_artifact, compressed_bytes, describe_artifact, write_artifact
from paretune.compression.export.graph import build_model, save_model

__all__ = ["ArtifactFacts", "build_model", "check_artifact", "compressed_bytes", "describe_artifact", "save_model", "write_artifact"]
