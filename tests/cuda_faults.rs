//! The emulated GPU's own promise: faults of kernels do not go by unseen, in memory of our own pool.

#![cfg(feature = "cuda-emulator")]

use astrai_rs::backend::emulator;

#[test]
fn faults_are_reported() {
    let report_of = |kernel| emulator::report_of(kernel).expect("memory");
    assert_eq!(report_of(c"broken_nowhere"), None);
    for (kernel, expect) in [
        (c"broken_read_past_the_end", "past the end of an allocation of 256 bytes"),
        (c"broken_write_before_the_start", "before an allocation of 256 bytes"),
        (c"broken_use_after_free", "freed memory"),
        (c"broken_barrier_of_some", "a barrier is not reached by all threads"),
        (c"broken_shuffle_of_some", "the lanes of a warp do not all reach"),
        (c"broken_different_operations", "lanes of a warp do different things"),
        (c"broken_race_of_write_and_read", "shared memory race"),
        (c"broken_race_of_two_writes", "shared memory race"),
        (c"broken_race_with_an_atomic", "shared memory race"),
        (c"broken_shared_memory_not_written", "read before it is written"),
        (c"broken_shared_memory_past_the_end", "index 64 of an array of 64"),
        (c"broken_copy_not_awaited", "copies to shared memory that nobody has waited for"),
        (c"broken_copy_into_what_others_read", "shared memory race"),
        (c"broken_unaligned_load", "no multiple of 16"),
        (c"broken_unaligned_store", "no multiple of its alignment"),
        (
            c"broken_prefetch_past_the_end",
            "prefetch: access to past the end of an allocation of 256 bytes",
        ),
        (c"broken_no_wait", "a thread ends without await_previous"),
        (c"broken_early_write", "accessed before await_previous"),
        (c"broken_early_read", "accessed before await_previous"),
    ] {
        let report = report_of(kernel).unwrap_or_default();
        assert!(report.contains(expect), "{kernel:?}: {report:?}");
    }
}
