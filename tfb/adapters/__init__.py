"""PEFT adapters: loading, the bridge to their layers, artifacts and exports."""
