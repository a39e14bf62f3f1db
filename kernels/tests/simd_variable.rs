//! `BRIGHTRUN_CPU_SIMD` caps the instructions. The variable is given to a child process: this test program itself.

#![allow(clippy::unwrap_used)]

use std::process::Command;

use brightrun_kernels::cpu::{Cpu, SimdLevel};

/// What `Cpu::new` makes of the variable; run as a child by the test below.
#[test]
fn report() {
    match Cpu::new(Some(1)) {
        Ok(cpu) => println!("level={}", cpu.simd_level()),
        Err(error) => println!("error={error}"),
    }
}

fn with_variable(value: &str) -> String {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "report", "--nocapture"])
        .env(SimdLevel::VARIABLE, value)
        .output()
        .unwrap();
    String::from_utf8(child.stdout).unwrap()
}

#[test]
fn the_variable_caps_the_level() {
    for level in SimdLevel::ALL {
        let expected = format!("level={}\n", level.min(SimdLevel::detect()));
        let output = with_variable(&level.to_string());
        assert!(output.contains(&expected), "{output}");
    }
}

#[test]
fn an_unknown_level_is_an_error_that_lists_the_choices() {
    let output = with_variable("sse9");
    for word in ["error=", "sse9", "portable", "avx2", "avx512", "avx512bf16"] {
        assert!(output.contains(word), "{output}");
    }
}
