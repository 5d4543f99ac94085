"""The comparison of Qwen3-Next with its dense predecessor at equal loss."""
