"""`paretune serve` and `paretune ui`: applications and servers, from start to orderly end."""
