"""What no run, version or alias needs any more, and its removal; decided first for all, then done."""
