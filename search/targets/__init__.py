"""Further hardware targets of a study: what its confirmed candidates cost there."""
