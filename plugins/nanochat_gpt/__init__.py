"""Model plugin ``gpt``: a decoder-only transformer with rotary positions and QK norm."""
