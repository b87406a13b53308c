// Text to token ids and back, as SentencePiece's BPE does it. Knows no model.
#pragma once
#include <algorithm>
#include <cmath>
#include "package.h"

struct Tokenizer {
  std::vector<std::string> bytes;  // of each token
  bool prefix;                     // whether a space is put before a text
  explicit Tokenizer(const Package& package) : package_(package) {
    if (package.one("tokenizer").at(0) != "sentencepiece-bpe" || package.number("tokenizer_strips_spaces") ||
        package.one("tokenizer_normalizer").at(0) != "identity")
      throw Refusal(package.path + ": its tokenizer needs Python: use torchchat chat");
    prefix = package.number("tokenizer_prefix");
    std::istringstream stream(package.read("extra/vocabulary.txt"));
    for (std::string text; std::getline(stream, text);) {
      const Words words = words_of(text);  // kind, score, bytes in hexadecimal
      const int id = int(bytes.size());
      bytes.push_back(words.size() > 2 ? from_hex(words[2]) : "");
      scores_.push_back(std::stof(words.at(1)));
      if (words[0] == "n" || words[0] == "d") ids_.emplace(bytes[id], id);
      if (words[0] == "d") whole_.push_back(bytes[id]);
      if (words[0] == "b") byte_ids_[bytes[id].at(0)] = id;
    }
  }

  // A message and what the chat format puts around it. before: the line of the package that says what comes first.
  std::vector<int> encode(const std::string& before, const std::string& message) const {
    std::vector<int> ids;
    std::string text;  // what stands between two special tokens is one text
    auto add = [&](const Words& parts) {
      for (const std::string& part : parts)
        if (part[0] == '=') text += from_hex(part.substr(1));
        else encode_text(std::exchange(text, ""), ids), ids.push_back(std::stoi(part));
    };
    add(package_.one(before));
    text += message;
    add(package_.one("chat_after_user"));
    encode_text(text, ids);
    return ids;
  }

 private:
  static std::string from_hex(const std::string& hex) {
    std::string text;
    for (size_t i = 0; i + 1 < hex.size(); i += 2) text += char(std::stoi(hex.substr(i, 2), nullptr, 16));
    return text;
  }

  // Merges the two neighbours that make the piece of the best score, the leftmost first, until no two make one.
  void encode_text(std::string text, std::vector<int>& ids) const {
    if (prefix && ids.empty() && !text.empty()) text = " " + text;
    std::vector<std::string> symbols;
    for (size_t at = 0, size; at < text.size(); at += size) {
      for (size = 1; at + size < text.size() && (text[at + size] & 0xC0) == 0x80;) ++size;  // a character of UTF-8
      for (const std::string& piece : whole_)  // is one wherever it stands
        if (piece.size() > size && text.compare(at, piece.size(), piece) == 0) size = piece.size();
      symbols.push_back(text.substr(at, size));
    }
    auto score = [&](size_t i) {  // of symbol i and the next as one
      auto found = i + 1 < symbols.size() ? ids_.find(symbols[i] + symbols[i + 1]) : ids_.end();
      return found == ids_.end() ? -INFINITY : scores_[found->second];
    };
    std::vector<float> scores;
    for (size_t i = 0; i < symbols.size(); ++i) scores.push_back(score(i));
    while (!scores.empty()) {
      const size_t i = std::max_element(scores.begin(), scores.end()) - scores.begin();
      if (scores[i] == -INFINITY) break;
      symbols[i] += symbols[i + 1];
      symbols.erase(symbols.begin() + i + 1);
      scores.erase(scores.begin() + i + 1);
      for (size_t changed = i - (i > 0); changed <= i; ++changed) scores[changed] = score(changed);
    }
    for (const std::string& symbol : symbols)
      if (auto found = ids_.find(symbol); found != ids_.end()) ids.push_back(found->second);
      else for (char c : symbol) ids.push_back(byte_ids_.count(c) ? byte_ids_.at(c) : int(package_.number("unknown")));
  }

  const Package& package_;
  std::vector<float> scores_;
  std::map<std::string, int> ids_;
  std::map<char, int> byte_ids_;
  std::vector<std::string> whole_;
};
