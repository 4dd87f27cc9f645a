"""What tests share: guests, oracles, logs, fleets, and tools that renew what documents show."""
