"""Operations of the network that plain PyTorch does not have, each with fast versions."""
