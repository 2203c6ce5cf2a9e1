"""From a student in torch to the folder that ships."""

from paretune.compression.export.artifact import ArtifactFacts, check_artifact, compressed_bytes, write_artifact
from paretune.compression.export.graph import build_model, save_model

__all__ = ["ArtifactFacts", "build_model", "check_artifact", "compressed_bytes", "save_model", "write_artifact"]
