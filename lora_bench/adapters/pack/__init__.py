"""K adapters on one frozen backbone, trained together."""
