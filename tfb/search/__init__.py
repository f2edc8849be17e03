"""The search for sigma on anchors."""
