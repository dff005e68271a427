"""The methods: which modules get which rank."""
