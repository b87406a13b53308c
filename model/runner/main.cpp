// Chats with an exported model: messages are lines of stdin, answers go to stdout as they are made.
#include <unistd.h>
#include <cmath>
#include <iostream>
#include <random>
#include "model.h"
#include "tokenizer.h"

using Numbers = std::map<std::string, double>;

// The likeliest token; at a temperature above 0 one drawn within what the model's makers recommend.
int sample(std::vector<float> logits, const std::vector<int>& tokens, Numbers how, std::mt19937_64& random) {
  const float penalty = how["repetition_penalty"];
  for (int token : std::set<int>(tokens.begin(), tokens.end()))
    logits[token] = logits[token] < 0 ? logits[token] * penalty : logits[token] / penalty;
  std::vector<std::pair<float, int>> order;
  for (float logit : logits) order.emplace_back(-logit, order.size());
  if (how["temperature"] == 0) return std::min_element(order.begin(), order.end())->second;
  std::sort(order.begin(), order.end());
  std::vector<double> weights;
  for (auto [negative, token] : order) weights.push_back(std::exp((order[0].first - negative) / how["temperature"]));
  weights = std::discrete_distribution<int>(weights.begin(), weights.end()).probabilities();
  size_t kept = 0;
  const size_t most = how["top_k"] > 0 ? std::min<size_t>(how["top_k"], weights.size()) : weights.size();
  for (double sum = 0; kept < most && sum < how["top_p"] && weights[kept] >= how["min_p"] * weights[0]; ++kept)
    sum += weights[kept];
  return order[std::discrete_distribution<int>(weights.begin(), weights.begin() + kept)(random)].second;
}

void chat(const Package& package, const Numbers& how, size_t most, std::mt19937_64 random) {
  const Tokenizer tokenizer(package);
  Model model(package);
  const Words ends = package.one("eos");
  std::vector<int> tokens;  // of the conversation
  size_t read = 0;          // so many of them are in the cache
  for (std::string message; std::cerr << (isatty(0) ? "> " : "") << std::flush, std::getline(std::cin, message);) {
    if (words_of(message).empty()) continue;
    if (package.number("chat_trim"))
      message.erase(message.find_last_not_of(" \t\r") + 1).erase(0, message.find_first_not_of(" \t"));
    std::vector<int> added = tokenizer.encode(tokens.empty() ? "chat_begin" : "chat_after_answer", message);
    if (!tokens.empty() && tokens.size() + added.size() >= model.max_seq_len) {
      std::cerr << "runner: the context is full: what was said is forgotten" << std::endl;
      tokens.clear(), read = 0, added = tokenizer.encode("chat_begin", message);
    }
    if (added.size() >= model.max_seq_len) throw Refusal("the message does not fit in the context");
    tokens.insert(tokens.end(), added.begin(), added.end());
    bool begun = !tokenizer.prefix;
    for (size_t i = 0; i < most && tokens.size() < model.max_seq_len; ++i) {
      const int token = sample(model.read(tokens, std::exchange(read, tokens.size())), tokens, how, random);
      if (std::find(ends.begin(), ends.end(), std::to_string(token)) != ends.end()) break;
      tokens.push_back(token);
      const std::string& bytes = tokenizer.bytes.at(token);
      std::cout << bytes.substr(!begun && bytes[0] == ' ') << std::flush;
      begun |= !bytes.empty();
    }
    std::cout << std::endl;
  }
}

int main(int count, char** words) try {
  // Before OpenMP starts: its threads then sleep while they wait, and keep no other program from the processor.
  if (!std::getenv("OMP_WAIT_POLICY") && !std::getenv("GOMP_SPINCOUNT"))
    setenv("GOMP_SPINCOUNT", "20000", 1), execv("/proc/self/exe", words);
  Numbers flags{{"--temperature", 0}, {"--seed", 0}, {"--max-new-tokens", 1e9}}, how;
  std::string path;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (!flags.count(word) && (word.starts_with("-") || !path.empty())) throw Refusal(word + " is unknown");
    std::istringstream value(flags.count(word) && ++i < count ? words[i] : "");
    if (!flags.count(word)) path = word;
    else if (!(value >> flags[word]) || !value.eof() || flags[word] < 0) throw Refusal(word + " takes a number >= 0");
  }
  if (path.empty()) throw Refusal("usage: runner FILE.pt2 [--temperature T] [--seed S] [--max-new-tokens N]");
  const Package package(path);
  const Words recommended = package.one("sampling");
  for (size_t i = 0; i + 1 < recommended.size(); i += 2) how[recommended[i]] = std::stod(recommended[i + 1]);
  how["temperature"] = flags["--temperature"];
  chat(package, how, size_t(flags["--max-new-tokens"]), std::mt19937_64(uint64_t(flags["--seed"])));
} catch (const std::exception& error) {  // torch's have many lines
  std::cerr << "runner: " << std::string(error.what()).substr(0, std::string(error.what()).find('\n')) << std::endl;
  return 2;
}
