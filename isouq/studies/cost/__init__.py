"""What each way to an uncertainty costs on this machine: time, peak memory, exactness."""
