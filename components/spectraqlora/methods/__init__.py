"""The methods: which modules get an adapter, and of which rank. One file each; the catalogue knows them all."""
