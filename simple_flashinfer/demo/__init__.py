"""The model that is served when none is named, so that the daemon runs offline on any machine."""
