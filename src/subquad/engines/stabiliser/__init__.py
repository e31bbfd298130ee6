"""The running maximum that keeps exponential gates within reach of float32."""
