"""Many devices and processes: processes (join, agree), mesh (the one sharding table), chips (their facts)."""
