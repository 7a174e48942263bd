"""What every other package stands on: errors, atomic writes, hashes, locks, devices and the wrapper of a command."""
