// Samples one image from a package that compile.py wrote, without Python. DPM-Solver++(2M) (arXiv 2211.01095) with
// Karras' spacing of the steps (arXiv 2206.00364, eq. 5), as in lamamba sample; for pixels and noise prediction.
//
//   torch=$(python -c "import torch; print(torch.__path__[0])")
//   g++ -std=c++20 -O1 -I$torch/include -I$torch/include/torch/csrc/api/include examples/aoti/sample.cpp -o sample
//       -L$torch/lib -ltorch -ltorch_cpu -lc10 -Wl,-rpath,$torch/lib                   (all on one line)
//   ./sample exported/package.pt2 1 32 32 9 sample.pgm                                 # channels, height, width, label
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cmath>
#include <fstream>
#include <iostream>
#include <vector>

constexpr int kTimesteps = 1000, kSteps = 25;
constexpr double kBetaStart = 1e-4, kBetaEnd = 2e-2, kGuidance = 2.0;

// The logarithm of noise over signal at each timestep of training.
std::vector<double> log_levels() {
  std::vector<double> levels;
  double kept = 1;
  for (int t = 0; t < kTimesteps; t++) {
    kept *= 1 - (kBetaStart + (kBetaEnd - kBetaStart) * t / (kTimesteps - 1));
    levels.push_back(std::log(1 / kept - 1) / 2);
  }
  return levels;
}

double timestep_of(double log_sigma, const std::vector<double>& levels) {
  int above = 1;
  while (above < kTimesteps - 1 && levels[above] < log_sigma) above++;
  return std::round(above - 1 + (log_sigma - levels[above - 1]) / (levels[above] - levels[above - 1]));
}

int main(int argc, char** argv) {
  if (argc != 7) {
    std::cerr << "usage: sample PACKAGE CHANNELS HEIGHT WIDTH LABEL OUT.pgm\n";
    return 2;
  }
  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader network(argv[1]);
  const int64_t channels = std::stoll(argv[2]), height = std::stoll(argv[3]), width = std::stoll(argv[4]);
  const auto label = torch::full({1}, std::stoll(argv[5]), torch::kLong);
  const auto guidance = torch::tensor(kGuidance, torch::kFloat);

  const auto levels = log_levels();
  const double most = std::exp(levels.back() / 7), least = std::exp(levels.front() / 7);
  std::vector<double> sigmas;
  for (int i = 0; i < kSteps; i++) sigmas.push_back(std::pow(most + (least - most) * i / (kSteps - 1), 7));
  sigmas.push_back(0);

  torch::manual_seed(0);
  auto x = torch::randn({1, channels, height, width});  // the noise of lamamba sample --seed 0
  torch::Tensor image, before;
  double log_step_before = 0;
  for (int i = 0; i < kSteps; i++) {
    const double sigma = sigmas[i], next = sigmas[i + 1];
    const auto t = torch::full({1}, timestep_of(std::log(sigma), levels), torch::kFloat);
    const auto noise = network.run({x, t, label, guidance})[0].slice(1, 0, channels);
    const double signal = 1 / std::sqrt(1 + sigma * sigma), next_signal = 1 / std::sqrt(1 + next * next);
    image = (x / signal - sigma * noise).clamp(-1, 1);
    if (next == 0) break;
    const double log_step = std::log(sigma / next);
    // The second order extrapolates from the clean image of the step before.
    const auto moved = i ? image + log_step / (2 * log_step_before) * (image - before) : image;
    x = next * next_signal / (sigma * signal) * x + next_signal * (1 - next / sigma) * moved;
    before = image;
    log_step_before = log_step;
  }
  const auto pixels = ((image[0] + 1) * 127.5).round().to(torch::kByte).permute({1, 2, 0}).contiguous();
  std::ofstream out(argv[6], std::ios::binary);
  out << (channels == 1 ? "P5 " : "P6 ") << width << " " << height << " 255\n";
  out.write(reinterpret_cast<const char*>(pixels.data_ptr<uint8_t>()), pixels.numel());
}
