"""What GaLore is compared with: LoRA and its kin."""
