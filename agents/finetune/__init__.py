"""Fine-tuning a backbone together with a method that removes tokens; one trainer for all."""
