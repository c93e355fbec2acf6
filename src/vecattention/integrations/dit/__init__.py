"""The parts of the diffusers integration: settings, announcements, processors, and the run that ties them together."""
