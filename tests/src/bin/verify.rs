//! `cargo verify`: every test, with what they need installed, started and built first. What follows `cargo verify` goes
//! to `cargo test`. A test that was skipped or ignored is a failure: here there is nothing it could lack.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use sidewarden_tests::progress::{Progress, seconds};
use sidewarden_tests::{interrupt, packages, python, stage, suite};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match interrupt::watch().and_then(|()| verify(&arguments)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn verify(arguments: &[String]) -> Result<ExitCode> {
    let started = Instant::now();
    let progress = Progress::start();
    stage::provide(&[packages::DEMO, packages::TESTS].concat(), &progress)?;
    python::provide(&progress)?;
    drop(progress);
    let ran = suite::run(arguments)?;
    println!("\ncargo verify took {}", seconds(started.elapsed()));
    Ok(if ran.good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
