"""What a candidate would cost, before it is measured: fits and rooflines."""
